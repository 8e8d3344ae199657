"""`cocoon up --engine triton`: the whole network on a real tritonserver."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.support.asking import ENDLESS, ask, wait_ended
from tests.support.network import LiveNetwork
from tests.support.triton import need_triton, triton_metric

RUNNING = 'cocoon_engine_running{model="skills-1"}'
STEPS = 'cocoon_engine_steps{model="skills-1"}'
ANSWERS = 'cocoon_engine_answers{{model="skills-1",outcome="{}"}}'


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    need_triton()
    folder = Path(tempfile.mkdtemp(prefix="cocoon-triton-"))
    try:
        with LiveNetwork(folder / "data", ("--engine", "triton")) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def client(network: LiveNetwork) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=network.sidecar, api_key=network.api_key, timeout=30) as found:
        yield found


def metric(network: LiveNetwork, name: str) -> float:
    url = network.running.engine_metrics_url
    assert url is not None
    return triton_metric(url, name)


def wait_for(network: LiveNetwork, name: str, wanted: float) -> None:
    deadline = time.monotonic() + 10
    while metric(network, name) != wanted:
        assert time.monotonic() < deadline, f"{name} stays at {metric(network, name)}"
        time.sleep(0.02)


def spoken(client: openai.OpenAI, text: str) -> list[str]:
    with client.chat.completions.create(**ask(text), stream=True) as stream:
        return [part for chunk in stream if (part := chunk.choices[0].delta.content)]


def test_a_stock_client_streams_an_answer_that_triton_made(
    network: LiveNetwork, client: openai.OpenAI
) -> None:
    before = metric(network, ANSWERS.format("complete"))
    parts = spoken(client, "Count from 1 to 9")
    assert "".join(parts).startswith("1")
    assert len(parts) > 1  # what waits together is sealed together
    wait_for(network, ANSWERS.format("complete"), before + 1)


def test_status_names_triton(network: LiveNetwork) -> None:
    told = json.loads(network.cli("status", "--json").stdout)
    assert told["services"]["triton"] is True


def test_a_client_that_leaves_stops_triton(network: LiveNetwork, client: openai.OpenAI) -> None:
    before = metric(network, ANSWERS.format("stopped"))
    asked = {**ENDLESS, "max_tokens": 600, "stream": True}
    for_good = {"X-Stainless-Retry-Count": openai.Omit()}
    with client.chat.completions.create(**asked, extra_headers=for_good) as stream:
        chunks = [next(stream) for _ in range(6)]
    wait_for(network, ANSWERS.format("stopped"), before + 1)
    wait_for(network, RUNNING, 0)
    steps = metric(network, STEPS)
    time.sleep(0.2)
    assert metric(network, STEPS) == steps
    job = wait_ended(network, chunks[0].id.removeprefix("chatcmpl-"))
    assert (job["status"], job["result"]["status"]) == ("settled", "cancelled")


def test_no_log_of_the_network_or_of_triton_holds_a_prompt(
    network: LiveNetwork, client: openai.OpenAI
) -> None:
    assert "".join(spoken(client, "Reverse: canarybird")) == "dribyranac"
    logs = [path.read_text(errors="replace") for path in network.folder.logs.iterdir()]
    assert any("GRPCInferenceService" in log for log in logs)
    assert not any("canarybird" in log or "dribyranac" in log for log in logs)


def test_a_killed_triton_is_started_again_and_serves(
    network: LiveNetwork, client: openai.OpenAI
) -> None:
    pid = network.folder.read_processes()["triton"]
    assert pid is not None
    psutil.Process(pid).kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert "".join(spoken(client, "Reverse: cocoon")) == "noococ"
            break
        except openai.APIError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert network.folder.read_processes()["triton"] not in (None, pid)
