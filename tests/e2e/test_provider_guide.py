"""docs/provider-guide.md as a newcomer follows it: init, doctor, run, an answer, money, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cocoon.agent.config import read_config
from tests.support.asking import ask
from tests.support.network import ROOT, LiveNetwork
from tests.support.ways import Way

pytestmark = pytest.mark.network
COMMAND = [sys.executable, "-m", "cocoon.cli", "provider"]


@dataclass
class Newcomer:
    """One provider that joins the running network."""

    config: Path
    agent: subprocess.Popen[str] | None = None

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments, "--config", str(self.config)], cwd=ROOT, capture_output=True,
            text=True, timeout=90, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def told(self, *arguments: str) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)

    def start(self) -> None:
        self.agent = subprocess.Popen(
            [*COMMAND, "run", "--config", str(self.config)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; the exit code and all that was said."""
        agent, self.agent = self.agent, None
        assert agent is not None
        agent.send_signal(signal.SIGINT)
        said, _ = agent.communicate(timeout=60)
        return agent.returncode, said


@pytest.fixture(scope="module")
def newcomer(network: LiveNetwork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    place = tmp_path_factory.mktemp("newcomer")
    done = subprocess.run(
        [*COMMAND, "init", "--yes", "--network", str(network.data), "--engine", "embedded",
         "--folder", str(place)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Newcomer(place / "provider.toml")
    try:
        yield found
    finally:
        if found.agent is not None:
            found.agent.kill()
            found.agent.communicate()


def until(what: Callable[[], Any], timeout_s: float = 45) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return found


def running(newcomer: Newcomer) -> dict[str, Any] | None:
    done = newcomer.cli("status", "--json")
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found if found["standing"]["attested"] else None


@pytest.mark.timeout(240)
def test_from_a_key_to_money_and_a_clean_end(
    newcomer: Newcomer, network: LiveNetwork, sidecar: Way
) -> None:
    checked = newcomer.cli("doctor")
    assert checked.returncode == 0, checked.stdout
    assert "standing: not enrolled yet" in checked.stdout
    missing = newcomer.cli("status")
    assert missing.returncode == 1
    assert "no agent runs" in missing.stderr

    newcomer.start()
    found = until(lambda: running(newcomer))
    assert found["provider_id"] in until(lambda: listed(network, found["provider_id"]))
    assert newcomer.cli("run").returncode == 1  # one agent a folder

    jobs = earned(newcomer, sidecar, found["provider_id"])
    assert int(jobs["balance_nanoton"]) == int(jobs["total"]["earned_nanoton"]) > 0
    for by in ("day", "model", "job"):
        rows = newcomer.told("earnings", "--by", by)["rows"]
        assert sum(int(row["earned_nanoton"]) for row in rows) == int(jobs["balance_nanoton"])
    lost = newcomer.told("why")
    assert lost["standing"]["attested"]
    checked = newcomer.cli("doctor", "--quick")
    assert checked.returncode == 0, checked.stdout
    assert "ok    standing" in checked.stdout

    code, said = newcomer.stop()
    assert code == 0, said
    for sentence in ("starting the agent", f"this is {found['provider_id']}", "attested until",
                     "skills-1 takes jobs", "draining", "stopped"):  # fmt: skip
        assert sentence in said, said
    assert newcomer.cli("status").returncode == 1


def listed(network: LiveNetwork, provider_id: str) -> list[str]:
    done = network.cli("status", "--json")
    names = [one["provider_id"] for one in json.loads(done.stdout)["providers"]]
    return names if provider_id in names else []


def earned(newcomer: Newcomer, sidecar: Way, provider_id: str) -> dict[str, Any]:
    """Three jobs that ask for it by name; what they brought, once the books have them."""
    for number in (5, 6, 7):
        wanted = {"provider": {"only": [provider_id]}}
        sidecar.complete(**ask(f"Count from 1 to {number}"), extra_body=wanted)

    def settled() -> dict[str, Any] | None:
        found: dict[str, Any] = newcomer.told("earnings")
        return found if found["total"]["jobs"] == 3 and not found["in_transit"]["jobs"] else None

    found: dict[str, Any] = until(settled)
    return found


def test_a_model_that_cannot_be_served_is_a_sentence(newcomer: Newcomer, tmp_path: Path) -> None:
    config = read_config(newcomer.config)
    text = newcomer.config.read_text().replace(
        'engine = "embedded"', 'engine = "openai"\nurl = "http://127.0.0.1:1/v1"'
    )
    wrong = tmp_path / "provider.toml"
    wrong.write_text(
        text.replace('"trust.json"', f'"{config.network.trust_file}"')
        .replace('"policy.json"', f'"{config.network.policy_file}"')
        .replace('"identity.seed"', f'"{config.agent.seed_file}"')
        .replace('"platform.json"', f'"{config.tee.dev_platform_file}"')
    )
    done = Newcomer(wrong).cli("doctor", "--json")
    assert done.returncode == 1
    checks = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    assert checks["engine of skills-1"]["state"] == "fail"
