"""A disk that is full for a while: the provider's spool, NATS's store, Postgres' data."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.chaos_world import ChaosWorld, Trial, trials
from tests.support.faulty_network import FaultyNetwork
from tests.support.small_disk import fill, small_disk

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
# whose disk, and how large it is: room for the network to start and to work for some minutes
DISKS = {"provider": 8 * 1024, "nats": 64 * 1024, "postgres": 192 * 1024}
FULL_S = 4.0
ANSWERS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosWorld]:
    data = tmp_path_factory.mktemp("disks") / "network"
    data.mkdir()
    with ExitStack() as stack:
        for name, kib in DISKS.items():
            stack.enter_context(small_disk(data / name, kib))
        yield ChaosWorld(stack.enter_context(FaultyNetwork(data)))


@pytest.mark.parametrize("name", DISKS)
async def test_a_disk_that_is_full_for_a_while_loses_nothing(world: ChaosWorld, name: str) -> None:
    filler = world.network.data / name / "filler"
    for _ in range(trials()):
        trial = Trial(f"disk full for {FULL_S:.0f} s: {name}")
        async with world.load() as load:
            await load.answered(ANSWERS, time.monotonic())
            fault_s = time.monotonic()
            fill(filler)
            await asyncio.sleep(FULL_S)
            filler.unlink()
            trial.at_s = time.monotonic()
            await load.answered(ANSWERS, trial.at_s, 60)
        await world.judge(trial, since_s=fault_s)

        assert trial.violations == []


def test_a_store_that_failed_is_found_and_nats_is_started_anew(world: ChaosWorld) -> None:
    said = files(world.network.data / "nats" / "nats.log")
    assert said.count("Server is ready") > 1


def files(path: Path) -> str:
    return path.read_text(errors="replace")
