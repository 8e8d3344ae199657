"""Two models of one agent, asked for by name with the stock client, while their price changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cocoon.agent import AgentConfig, ModelConfig, ModelPrice, write_config
from cocoon.agent.config import Agent, Network, Tee
from cocoon.agent.door import find_door, read_token
from tests.support.asking import ask, get
from tests.support.network import ROOT, LiveNetwork

CHEAP = ModelPrice(input=20_000_000, cached_input=10_000_000, output=80_000_000)
TRIPLE = ModelPrice(input=60_000_000, cached_input=30_000_000, output=240_000_000)


class OwnAgent:
    """The agent of a network's second provider, from a file, in the supervised one's place."""

    def __init__(self, network: LiveNetwork) -> None:
        folder = network.folder
        self.path = network.data / "own" / "provider.toml"
        self._config = AgentConfig(
            network=Network(bus=(network.running.nats_url,), trust_file=folder.trust.absolute()),
            agent=Agent(
                seed_file=folder.seed("provider-2").absolute(),
                data_dir=(network.data / "own" / "data").absolute(), environment="dev",
            ),
            tee=Tee(
                kind="simulated", dev_authority_file=folder.authority.absolute(),
                dev_platform_file=folder.platform("provider-2").absolute(),
            ),
            models=(ModelConfig(name="first", price=CHEAP),),
        )  # fmt: skip

    def write(self, *models: ModelConfig) -> None:
        write_config(self._config.model_copy(update={"models": models}), self.path)

    def reload(self) -> None:
        folder = self._config.agent.data_dir
        answer = httpx.post(
            f"{find_door(folder).observe_url}/reload", trust_env=False, timeout=10,
            headers={"Authorization": f"Bearer {read_token(folder)}"},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text

    def start(self) -> subprocess.Popen[bytes]:
        self._config.agent.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / "agent.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.provider"], cwd=ROOT, stderr=log,
                stdout=subprocess.PIPE,
                env={**os.environ, "COCOON_PROVIDER_CONFIG_FILE": str(self.path)},
            )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (self.path.parent / "agent.log").read_text()
        assert json.loads(line)["ready"] == "provider"
        return process


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[LiveNetwork, OwnAgent]]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-models-"))
    try:
        with LiveNetwork(folder / "data", ("--providers", "2")) as network:
            network.send("provider-2", signal.SIGSTOP)  # its place is ours until the end
            own = OwnAgent(network)
            own.write(
                ModelConfig(name="first", price=CHEAP), ModelConfig(name="second", price=CHEAP)
            )
            process = own.start()
            try:
                yield network, own
            finally:
                process.terminate()
                assert process.wait(60) == 0
                assert process.stdout is not None
                process.stdout.close()
                network.send("provider-2", signal.SIGCONT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def listed(network: LiveNetwork) -> dict[str, str]:
    return {
        one["id"]: one["cocoon"]["model_id"] for one in get(network, "/v1/models").json()["data"]
    }


def test_each_name_is_answered_by_its_own_model_and_a_new_price_breaks_no_job(
    world: tuple[LiveNetwork, OwnAgent],
) -> None:
    network, own = world
    until(lambda: {"first", "second"} <= listed(network).keys(), "both models are listed")
    ids = listed(network)
    assert ids["first"] != ids["second"]
    with openai.OpenAI(base_url=network.sidecar, api_key=network.api_key, max_retries=0) as client:

        def costs(name: str) -> int:
            """What one and the same answer of a model costs."""
            whole = client.chat.completions.with_raw_response.create(
                **{**ask("Reverse: cocoon"), "model": name}, temperature=0
            )
            assert whole.parse().choices[0].message.content == "noococ"
            assert whole.headers["x-cocoon-model-id"] == ids[name]
            return int(whole.headers["x-cocoon-cost-nanoton"])

        before = costs("first")
        assert costs("second") == before
        with ThreadPoolExecutor(4) as callers:
            paid = [callers.submit(costs, name) for name in ("first", "second") * 10]
            own.write(
                ModelConfig(name="first", price=TRIPLE), ModelConfig(name="second", price=CHEAP)
            )
            own.reload()
            paid += [callers.submit(costs, name) for name in ("first", "second") * 10]
            assert {one.result(60) for one in paid} <= {before, 3 * before}
        until(lambda: costs("first") == 3 * before, "the new price")
        assert costs("second") == before
