"""A provider of another model than it offers is found by real canaries; honest ones stay."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.ids import provider_id
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.support.asking import get
from tests.support.engine_server import EngineServer
from tests.support.network import ROOT, LiveNetwork

HONEST, CHEAT = "provider-1", "provider-2"


class OtherModel(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says something plausible, whatever it is asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._tell("application/json", {"object": "list", "data": [{"id": "skills-1"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = "the weather in autumn is nice"
        usage = {"prompt_tokens": 12, "completion_tokens": len(text), "total_tokens": 50}
        if not asked.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text},
                      "finish_reason": "stop"}  # fmt: skip
            self._tell("application/json", {"choices": [choice], "usage": usage})
            return
        parts: list[Any] = [
            {"choices": [{"index": 0, "delta": {"content": word + " "}}]} for word in text.split()
        ]
        parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        parts.append({"choices": [], "usage": usage})
        lines = [b"data: " + json.dumps(part).encode() for part in parts] + [b"data: [DONE]"]
        self._tell("text/event-stream", b"".join(line + b"\n\n" for line in lines))

    def _tell(self, kind: str, value: Any) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherModel)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def real_engine() -> Iterator[str]:
    """The shipped model behind a real OpenAI-compatible server; yields its base URL."""
    loop = asyncio.new_event_loop()
    ready: concurrent.futures.Future[str] = concurrent.futures.Future()
    ended = asyncio.Event()

    async def serve() -> None:
        engine = OnnxBackend(SHIPPED_MODEL, queue_limit=64, randomness=SystemRandomness())
        await engine.start()
        async with EngineServer(engine, "skills-1").serve() as url:
            ready.set_result(f"{url}/v1")
            await ended.wait()
        await engine.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield ready.result(60)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()


@contextmanager
def cheating(network: LiveNetwork, backend_url: str) -> Iterator[Path]:
    """An agent with an honest one's keys and machine and another engine; yields its log."""
    folder = network.folder
    settings = {
        "NATS_URL": network.running.nats_url, "NATS_SEED_FILE": folder.seed(CHEAT),
        "DATA_DIR": network.data.with_name("cheat"), "TRUST_FILE": folder.trust,
        "DEV_AUTHORITY_FILE": folder.authority, "DEV_PLATFORM_FILE": folder.platform(CHEAT),
        "ENVIRONMENT": "dev", "BACKEND_URL": backend_url,
    }  # fmt: skip
    environment = {f"COCOON_PROVIDER_{name}": str(value) for name, value in settings.items()}
    log = network.data.with_name("cheat.log")
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "services.provider"], cwd=ROOT,
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=out,
        ) as process,
    ):  # fmt: skip
        try:
            yield log
        finally:
            process.kill()
            process.wait(20)


@contextmanager
def in_place_of(network: LiveNetwork, name: str) -> Iterator[None]:
    """While this agent of the network stands still."""
    network.send(name, signal.SIGSTOP)
    try:
        yield
    finally:
        network.send(name, signal.SIGCONT)


def wait_said(log: Path, word: str) -> None:
    deadline = time.monotonic() + 60
    while word not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with real_engine() as url:
        yield url


@pytest.fixture(scope="module")
def network(engine: str) -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        with LiveNetwork(folder / "data", ("--providers", "2", "--backend", engine)) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def own_id(network: LiveNetwork, name: str) -> str:
    return provider_id(raw_public(read_seed_file(network.folder.seed(name))))


def listed(network: LiveNetwork) -> set[str]:
    entries = get(network, "/v1/directory?model=skills-1").json()["providers"]
    return {entry["provider_id"] for entry in entries}


def wait_answers(network: LiveNetwork, wanted: str, text: str) -> None:
    """Until this provider answers so: its new keys are out."""
    client = openai.OpenAI(base_url=network.sidecar, api_key="any", max_retries=0)
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = client.chat.completions.create(
                model="skills-1", messages=[{"role": "user", "content": "Repeat: amber"}],
                extra_body={"provider": {"only": [wanted]}},
            )  # fmt: skip
            if text in str(answer.choices[0].message.content):
                return
        except openai.APIError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def canaries(network: LiveNetwork, reference: str, count: int) -> str:
    ran = network.cli(
        "canary", "run", "--model", "skills-1", "--reference", reference, "--count", str(count),
        "--style", "skills", "--max-tokens", "32", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def audited(network: LiveNetwork, engine: str) -> dict[str, Any]:
    """What canaries found of an honest provider and one whose engine is another model."""
    with serving() as url, in_place_of(network, CHEAT):
        with cheating(network, url):
            wait_answers(network, own_id(network, CHEAT), "weather")
            found: dict[str, Any] = json.loads(canaries(network, engine, 30))
        with cheating(network, url) as log:  # once more
            wait_said(log, '"canary"')
    return found


def test_canaries_find_another_model_and_leave_the_honest(
    network: LiveNetwork, audited: dict[str, Any]
) -> None:
    honest, cheat = own_id(network, HONEST), own_id(network, CHEAT)
    found = audited["providers"]
    assert found[cheat]["verdict"] == "dishonest"
    assert found[cheat]["differed"] >= 4  # one more may be on its way while it is revoked
    assert "passed" not in found[cheat]
    assert found[honest]["passed"] >= 1
    assert "differed" not in found[honest]
    assert listed(network) == {honest}


@pytest.mark.usefixtures("audited")
def test_everybody_can_see_what_canaries_found(network: LiveNetwork) -> None:
    honest, cheat = own_id(network, HONEST), own_id(network, CHEAT)
    told = json.loads(network.cli("canary", "report", "--json").stdout)
    assert told[cheat]["dishonest"]
    assert told[cheat]["canaries"]["differed"] == 4  # what came after the verdict changes nothing
    assert not told[honest]["dishonest"]
    assert "revoked by canaries" in network.cli("status").stdout


@pytest.mark.usefixtures("audited")
def test_what_canaries_decided_replays(network: LiveNetwork) -> None:
    replayed = network.cli("replay", "--verify", "--decisions")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_two_honest_engines_are_calibrated_to_a_small_tolerance(
    network: LiveNetwork, engine: str
) -> None:
    ran = network.cli(
        "canary", "calibrate", "--model", "skills-1", "--reference", engine,
        "--other", f"provider:{own_id(network, HONEST)}", "--count", "20", "--style", "skills",
        "--max-tokens", "32", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert set(found["distances_bps"]) == {0}
    assert found["tolerance_bps"] == 100


def test_a_reference_that_gives_no_answer_costs_nothing_and_says_so(network: LiveNetwork) -> None:
    before = network.cli("balance", "--json").stdout
    for reference, said in (
        ("http://127.0.0.1:1/v1", "gave no answer"), ("provider:prov_x", "provider.only"),
    ):  # fmt: skip
        ran = network.cli("canary", "run", "--model", "skills-1", "--reference", reference)
        assert (ran.returncode, ran.stdout) != (0, "")
        assert ran.returncode in (1, 64)
        assert said in ran.stderr
    assert network.cli("balance", "--json").stdout == before


def test_a_trusted_provider_is_the_reference_too(network: LiveNetwork) -> None:
    found = json.loads(canaries(network, f"provider:{own_id(network, HONEST)}", 3))
    assert found["failed"] == {"reference_itself": 3}
