"""Prices that changed, and what the agent tells of itself: counts, rates, GPUs, its door."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cocoon.agent.door import AgentDoor, close_door, find_door, open_door, read_token
from cocoon.kernel.errors import NotFound
from services.provider.gpus import find_gpus, read_gpus
from services.provider.prices import MAX_OLD_PRICES, PriceBook
from services.provider.tallying import Tally

OLD, NEW, NEWER = (1, 1, 1), (2, 2, 2), (3, 3, 3)


def test_an_old_price_is_taken_until_a_while_after_the_network_knows_the_new_one() -> None:
    book = PriceBook(OLD)
    book.change(NEW)
    assert book.takes(OLD, 1e9)  # nobody has heard of the new one: matches still cite it
    assert book.takes(NEW, 0)
    book.published(NEW, until_s=100)
    assert book.takes(OLD, 99)
    assert not book.takes(OLD, 100)
    assert not book.takes(NEWER, 0)


def test_a_price_that_is_published_after_it_was_changed_again_stays_good() -> None:
    book = PriceBook(OLD)
    book.change(NEW)
    book.change(NEWER)
    book.published(NEW, until_s=100)  # the offer that was on its way
    assert book.takes(NEW, 1e9)
    assert not book.takes(OLD, 100)
    book.published(NEWER, until_s=200)
    assert not book.takes(NEW, 200)


def test_a_price_that_comes_back_is_current_again_and_old_ones_are_few() -> None:
    book = PriceBook(OLD)
    book.change(NEW)
    book.change(OLD)
    book.published(OLD, until_s=0)
    assert book.takes(OLD, 1e9)
    for number in range(100):
        book.change((number, 0, 0))
    taken = [number for number in range(100) if book.takes((number, 0, 0), 0)]
    assert taken == list(range(100 - MAX_OLD_PRICES - 1, 100))


class Clock:
    """Monotonic seconds as the test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def now_ms(self) -> int:
        return 0


def test_tokens_a_second_are_of_the_last_minute() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.count(10, 30)
    assert tally.tokens_per_s() == 30  # one second at least
    clock.now_s += 30
    tally.count(0, 60)
    assert tally.tokens_per_s() == 3
    clock.now_s += 59
    assert tally.tokens_per_s() == 1
    clock.now_s += 2
    assert tally.tokens_per_s() == 0
    assert (tally.jobs, tally.input_tokens, tally.output_tokens) == (2, 10, 90)


def test_gpus_are_read_as_the_driver_tells_them() -> None:
    text = "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 1024, 7\nOdd, 1, [N/A], [N/A], [N/A]\nbad\n"
    first, odd = read_gpus(text)
    assert first == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "memory_mib": 81559,
        "memory_used_mib": 1024, "utilisation_percent": 7,
    }  # fmt: skip
    assert odd["memory_mib"] is None


async def test_without_the_driver_s_tool_or_with_a_broken_one_there_are_no_gpus(
    tmp_path: Path,
) -> None:
    assert await find_gpus("no-such-tool") == []
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho 'A, 1, 2, 3, 4'\nexit 9\n")
    tool.chmod(0o700)
    assert await find_gpus(str(tool)) == []
    tool.write_text("#!/bin/sh\necho 'A, 1, 2, 3, 4'\n")
    assert [gpu["name"] for gpu in await find_gpus(str(tool))] == ["A"]


def test_commands_find_the_agent_and_its_token_is_for_its_user_alone(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        find_door(tmp_path)
    open_door(tmp_path, AgentDoor(4711, "http://127.0.0.1:1", 5), "secret")
    assert find_door(tmp_path) == AgentDoor(4711, "http://127.0.0.1:1", 5)
    assert read_token(tmp_path) == "secret"
    mode = (tmp_path / "control.token").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    close_door(tmp_path, 4712)  # another process's
    assert find_door(tmp_path).pid == 4711
    close_door(tmp_path, 4711)
    assert list(tmp_path.iterdir()) == []
