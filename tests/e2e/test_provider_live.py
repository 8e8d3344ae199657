"""A running agent from its owner's terminal: watched, and told to read its file again."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cocoon.agent.config import read_config
from cocoon.agent.writing import write_config
from tests.e2e.test_provider_guide import COMMAND, Newcomer, newcomer, running, until
from tests.support.network import ROOT

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]
CLEAR = b"\x1b[H\x1b[2J"
assert newcomer


@pytest.fixture(scope="module")
def owner(newcomer: Newcomer) -> Iterator[Newcomer]:
    """Somebody whose agent runs and is attested."""
    newcomer.start()
    until(lambda: running(newcomer))
    yield newcomer
    newcomer.stop()


@pytest.fixture
def copied(owner: Newcomer) -> Iterator[Path]:
    """The file, put back and taken over again at the end."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(shutil.copy2(owner.config, folder))
        yield kept
        shutil.copy2(kept, owner.config)
    assert owner.cli("reload").returncode == 0


def reprice(owner: Newcomer, output: int) -> None:
    config = read_config(owner.config)
    price = config.models[0].price.model_copy(update={"output": output})
    models = (config.models[0].model_copy(update={"price": price}),)
    write_config(config.model_copy(update={"models": models}), owner.config)


def shown(owner: Newcomer) -> dict[str, Any]:
    (model,) = owner.told("status")["models"]
    found: dict[str, Any] = model
    return found


@pytest.mark.usefixtures("copied")
def test_a_new_price_is_taken_over_by_reload_and_a_broken_file_is_not(owner: Newcomer) -> None:
    before = shown(owner)["price"]["output"]
    reprice(owner, before + 1)
    assert shown(owner)["price"]["output"] == before
    told = owner.told("reload")
    assert told["ok"] is True
    assert shown(owner)["price"]["output"] == before + 1

    owner.config.write_text(owner.config.read_text().replace("output = ", "outputs = "))
    refused = owner.cli("reload")
    assert refused.returncode == 1
    assert "outputs" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_reload_without_an_agent_says_how_to_start_one(tmp_path: Path, owner: Newcomer) -> None:
    config = read_config(owner.config)
    agent = config.agent.model_copy(update={"data_dir": tmp_path / "none"})
    write_config(config.model_copy(update={"agent": agent}), tmp_path / "provider.toml")
    done = Newcomer(tmp_path / "provider.toml").cli("reload")
    assert done.returncode == 1
    assert "no agent runs" in done.stderr


def screens(master: int, count: int) -> list[bytes]:
    """What is drawn, until so many screens are whole."""
    drawn, ends_s = b"", time.monotonic() + 60
    while drawn.count(CLEAR) <= count:
        assert time.monotonic() < ends_s, drawn
        if select.select([master], [], [], 1)[0]:
            drawn += os.read(master, 65_536)
    return drawn.split(CLEAR)[1 : count + 1]


def drain(master: int) -> None:
    """Read until the terminal's last writer has left it."""
    ends_s = time.monotonic() + 60
    with contextlib.suppress(OSError):  # how Linux tells it
        while time.monotonic() < ends_s:
            if select.select([master], [], [], 1)[0] and not os.read(master, 65_536):
                return


def test_a_watched_status_is_drawn_again_on_a_terminal_until_ctrl_c(owner: Newcomer) -> None:
    master, slave = pty.openpty()
    watching = subprocess.Popen(
        [*COMMAND, "status", "--watch", "--config", str(owner.config)], cwd=ROOT, stdin=slave,
        stdout=slave, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        os.close(slave)
        for screen in screens(master, 2):
            text = screen.decode()
            assert "taking jobs" in text
            assert "skills-1" in text
            assert "TON with" in text
        watching.send_signal(signal.SIGINT)
        drain(master)  # a terminal that nobody reads would hold the last screen up
        _, said = watching.communicate(timeout=30)
        assert "Traceback" not in said
        assert watching.returncode in (0, 130)
    finally:
        watching.kill()
        watching.communicate()
        os.close(master)


def test_a_watch_into_a_file_draws_nothing_and_is_not_json(owner: Newcomer) -> None:
    both = owner.cli("status", "--watch", "--json")
    assert both.returncode != 0
    assert "give --watch or --json" in both.stderr
