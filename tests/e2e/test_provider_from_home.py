"""docs/provider-guide.md, "On a remote machine", word for word, with an empty HOME and from behind
a router that translates addresses: from `init` to money, timed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.devnet.ports import free_port
from tests.support.home import TranslatedHome, possible, translated_home
from tests.support.network import ROOT, LiveNetwork

pytestmark = [
    pytest.mark.network, pytest.mark.timeout(300),
    pytest.mark.skipif(not possible(), reason="no network namespaces here: needs root and `ip`"),
]  # fmt: skip
SERVER = "cocoon.test"
WAIT_S = 60.0


@dataclass
class Remote:
    """A person at home with a checkout, two files of the operator and an empty HOME."""

    home: TranslatedHome
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("COCOON_", "PYTHON"))}
        return {**plain, "HOME": str(self.folder / "home"), "PYTHONUNBUFFERED": "1"}

    def command(self, *arguments: str) -> list[str]:
        return self.home.command(str(ROOT / "cocoon"), "provider", *arguments)

    def cocoon(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment, text=True,
            capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def config(self) -> tuple[str, str]:
        return "--config", str(self.folder / "agent" / "provider.toml")

    def told(self, *arguments: str) -> Any:
        done = self.cocoon(*arguments, "--json", *self.config)
        return json.loads(done.stdout) if done.returncode == 0 else None


@pytest.fixture(scope="module")
def entry_port() -> int:
    while True:
        port = free_port()
        if port < 65_000:
            return port


@pytest.fixture(scope="module")
def network(entry_port: int) -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        with LiveNetwork(folder / "data", ("--entry", f"{SERVER}:{entry_port}")) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def remote(network: LiveNetwork, entry_port: int) -> Iterator[Remote]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-remote-"))
    (folder / "home").mkdir()
    for file in (network.folder.trust, network.folder.bus_ca):  # what the operator hands over
        shutil.copy(file, folder)
    ports = (entry_port, entry_port + 1, entry_port + 2)
    try:
        with translated_home(SERVER, ports) as home:
            yield Remote(home, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return found


def answer(network: LiveNetwork, provider_id: str) -> str | None:
    """What a client that asks for this provider and its tier is told; None: not listed yet."""
    client = openai.OpenAI(base_url=network.sidecar, api_key="any", max_retries=0, timeout=30)
    try:
        told = client.chat.completions.with_raw_response.create(
            model="skills-1", messages=[{"role": "user", "content": "Reverse: cocoon"}],
            extra_body={"provider": {"only": [provider_id], "tiers": ["open"]}},
        )  # fmt: skip
    except (openai.BadRequestError, openai.InternalServerError):
        return None
    finally:
        client.close()
    assert told.headers["x-cocoon-provider"] == provider_id
    assert told.headers["x-cocoon-tier"] == "open"
    return str(told.parse().choices[0].message.content)


def test_from_an_empty_home_behind_a_router_to_money(
    network: LiveNetwork, remote: Remote, entry_port: int
) -> None:
    began_s = time.monotonic()
    gateway = f"https://{SERVER}:{entry_port + 2}"
    made = remote.cocoon(
        "init", "--network", gateway, "--trust", "trust.json", "--ca", "bus-ca.pem", "--engine",
        "embedded", "--folder", "agent", "--yes",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "open: this machine has no TEE" in made.stdout
    checked = remote.cocoon("doctor", *remote.config)
    assert checked.returncode == 0, checked.stdout
    agent = subprocess.Popen(
        remote.command("run", *remote.config), cwd=remote.folder, env=remote.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        status = until(lambda: remote.told("status"))
        provider_id = status["provider_id"]
        assert until(lambda: answer(network, provider_id)) == "noococ"
        earned = until(lambda: (found := remote.told("earnings")) and int(found["balance_nanoton"]))
        assert earned > 0
        print(f"from init to money: {time.monotonic() - began_s:.1f} s")

        remote.home.stop_router()
        remote.home.start_router()
        assert until(lambda: answer(network, provider_id)) == "noococ"
    finally:
        agent.send_signal(signal.SIGINT)
        said, _ = agent.communicate(timeout=60)
    assert agent.returncode == 0, said
    assert "in the open tier until" in said
    assert "stopped" in said


def test_a_gateway_of_an_unknown_authority_is_a_sentence(remote: Remote, entry_port: int) -> None:
    gateway = f"https://{SERVER}:{entry_port + 2}"
    refused = remote.cocoon(
        "init", "--network", gateway, "--trust", "trust.json", "--folder", "other", "--yes"
    )
    assert refused.returncode == 1
    assert "--ca FILE" in refused.stderr
    assert not (remote.folder / "other").exists()
