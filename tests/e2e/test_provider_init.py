"""`cocoon provider init` on a running network: three questions, one file, nothing overwritten."""

from __future__ import annotations

import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cocoon.agent.config import read_config
from cocoon.cli.provider_network import fingerprint, same_fingerprint
from tests.support.network import ROOT, LiveNetwork

pytestmark = pytest.mark.network
COMMAND = [sys.executable, "-m", "cocoon.cli", "provider", "init"]


def init(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_yes_takes_every_default_and_writes_one_file_with_a_key_of_its_own(
    network: LiveNetwork, tmp_path: Path
) -> None:
    place = tmp_path / "provider"
    done = init("--yes", "--network", str(network.data), "--engine", "embedded",
                "--folder", str(place))  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = read_config(place / "provider.toml")
    assert config.network.gateway == network.gateway
    assert config.network.trust_file.read_bytes() == network.folder.trust.read_bytes()
    assert (config.agent.environment, config.tee.kind) == ("dev", "simulated")
    (model,) = config.models
    assert (model.name, model.engine) == ("skills-1", "embedded")
    assert model.price.all == (20_000_000, 10_000_000, 80_000_000)  # the only other's
    for secret in (config.agent.seed_file, config.tee.dev_platform_file):
        assert secret is not None
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert fingerprint(network.folder.trust.read_bytes()) in done.stdout
    assert f"Next: ./cocoon provider doctor --config {place / 'provider.toml'}" in done.stdout

    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    again = init("--yes", "--network", str(network.data), "--folder", str(place))
    assert again.returncode == 1
    assert "is there already and nothing was changed" in again.stderr
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_price_of_ones_own_keeps_the_markets_proportions(
    network: LiveNetwork, tmp_path: Path
) -> None:
    done = init("--yes", "--network", str(network.data), "--engine", "embedded", "--price", "0.16",
                "--folder", str(tmp_path / "p"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    price = read_config(tmp_path / "p" / "provider.toml").models[0].price
    assert price.all == (40_000_000, 20_000_000, 160_000_000)


def test_a_person_is_asked_three_questions_and_each_has_a_default(
    network: LiveNetwork, tmp_path: Path
) -> None:
    place = tmp_path / "asked"
    said = answered(
        [*COMMAND, "--folder", str(place)],
        [("network", str(network.data)), ("number", ""), ("price", "0.09")],
    )
    assert said.count("\n1. ") + said.count("\n2. ") + said.count("\n3. ") + said.startswith(
        "1. "
    ) == 3, said  # fmt: skip
    config = read_config(place / "provider.toml")
    assert config.models[0].price.output == 90_000_000


def test_an_answer_that_cannot_be_taken_is_asked_for_again(
    network: LiveNetwork, tmp_path: Path
) -> None:
    place = tmp_path / "again"
    said = answered(
        [*COMMAND, "--folder", str(place)],
        [("network", "/nowhere"), ("network", str(network.data)), ("number", "70"),
         ("number", "1"), ("price", "0,05"), ("price", "0.05")],
    )  # fmt: skip
    for sentence in ("no network runs from", "there is no 70 in the list", "'0,05' is not an"):
        assert sentence in said
    assert read_config(place / "provider.toml").models[0].price.output == 50_000_000


def answered(command: list[str], answers: list[tuple[str, str]]) -> str:
    """Run in a terminal and answer each prompt as it comes; what was said."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, left, seen = "", list(answers), 0
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 1)
            if not ready:
                if child.poll() is not None:
                    break
                continue
            try:
                data = os.read(ours, 4096)
            except OSError:  # the terminal is closed: it has ended
                break
            said += data.decode().replace("\r", "")
            if left and f"   {left[0][0]}" in said[seen:] and said.endswith(": "):
                seen = len(said)
                os.write(ours, f"{left.pop(0)[1]}\n".encode())
    finally:
        os.close(ours)
        if child.poll() is None:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    assert child.returncode == 0, said
    assert left == [], said
    return said


def test_without_a_terminal_and_without_yes_it_asks_nobody(tmp_path: Path) -> None:
    done = init("--folder", str(tmp_path / "p"))
    assert done.returncode == 64
    assert "--yes" in done.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--network", "http://127.0.0.1:1"), "does not answer"),
        (("--network", "/nowhere"), "no network runs from"),
        (("--engine", "http://127.0.0.1:1/v1"), "names no models"),
        (("--engine", "embedded", "--model", "gpt"), "the embedded engine serves skills-1"),
        (("--engine", "embedded", "--price", "cheap"), "the price: "),
        (("--engine", "embedded", "--price", "1000001"), "the price: at most 1000000 TON"),
        (("--engine", "embedded", "--region", "EU West"), "agent.region"),
        (("--engine", "embedded", "--fingerprint", "00"), "has another fingerprint"),
    ],
)
def test_a_wrong_answer_is_a_sentence_and_writes_nothing(
    network: LiveNetwork, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = arguments if "--network" in arguments else ("--network", str(network.data), *arguments)
    done = init("--yes", "--folder", str(tmp_path / "p"), *given)
    assert done.returncode in (1, 64)
    assert said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()


def test_a_fingerprint_is_compared_as_people_write_it() -> None:
    whole = fingerprint(b"trust")
    assert same_fingerprint(whole.upper().replace(" ", ""), whole)
    assert not same_fingerprint(whole[:-1], whole)
