"""`cocoon connect` as a person runs it: what it says when it cannot start and when it stops."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cocoon.evidence.trust import trust_document
from tests.support.client_world import KEY, TestNetwork, served, trust

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world


@pytest.fixture
def command(network: TestNetwork, tmp_path: Path) -> list[str]:
    (tmp_path / "trust.json").write_bytes(trust_document(trust()))
    return [
        sys.executable, "-m", "cocoon.cli", "connect", "--port", "0", "--gateway", network.url,
        "--trust", str(tmp_path / "trust.json"), "--key", KEY, "--state", str(tmp_path / "state"),
    ]  # fmt: skip


@contextmanager
def connected(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield process, process.stderr.readline().split()[2]
        finally:
            process.kill()


def test_a_directory_in_use_is_one_plain_sentence(command: list[str], tmp_path: Path) -> None:
    with connected(command):
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.splitlines() == [
        f"cocoon: another client uses the state directory {tmp_path / 'state'}; close that one "
        "first, or name another directory"
    ]


@pytest.mark.usefixtures("hearing_hangups")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_a_word(command: list[str], by: signal.Signals) -> None:
    with connected(command) as (process, url):
        assert httpx.get(f"{url}/models").status_code == 200
        process.send_signal(by)
        assert process.communicate(timeout=20) == (None, "stopped\n")
        assert process.returncode == 0


def test_whoever_reads_an_answer_meanwhile_is_told(
    command: list[str], network: TestNetwork
) -> None:
    network.faults.slow_after = 2
    with (
        connected(command) as (process, url),
        httpx.stream("POST", f"{url}/chat/completions", json={**ASK, "stream": True}) as answer,
    ):
        said = answer.iter_lines()
        next(said)  # it has begun
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == (None, "stopped\n")
        assert "client_closed" in "".join(said)
