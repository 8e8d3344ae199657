"""Every check of the doctor, passing and failing; what fails says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cocoon.agent.config import AgentConfig, ModelConfig
from cocoon.agent.market import Prices
from cocoon.bus.keys import seed_file
from cocoon.kernel.clock import SystemRandomness
from services.provider import doctor, doctor_machine, doctor_models, doctor_network
from services.provider.backends.onnx import OnnxBackend
from services.provider.findings import Finding
from services.provider.settings import SHIPPED_MODEL
from tests.support.engine_server import EngineServer

PRICE = {"input": 20, "cached_input": 10, "output": 80}
NOW_MS = 1_790_000_000_000


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": "skills-1", "price": PRICE, **changes})


def config(folder: Path, *models: ModelConfig, **tee: Any) -> AgentConfig:
    return AgentConfig.model_validate({
        "network": {"bus": ["nats://127.0.0.1:1"], "trust_file": folder / "trust.json"},
        "agent": {
            "seed_file": folder / "identity.seed", "data_dir": folder / "data",
            "environment": "dev",
        },
        "tee": tee or {"kind": "none"},
        "models": [one.model_dump() for one in models or (model(),)],
    })  # fmt: skip


def states(*findings: Finding) -> list[str]:
    for one in findings:
        assert one.found
        assert bool(one.remedy) is (one.state != "ok"), one
    return [one.state for one in findings]


# ---- this machine ----


def test_a_tdx_guest_is_one_that_can_ask_for_quotes(tmp_path: Path) -> None:
    asks = config(tmp_path, kind="tdx")
    assert states(doctor_machine.tee(asks, tmp_path)) == ["ok"]
    lacking = doctor_machine.tee(asks, tmp_path / "none")
    assert states(lacking) == ["fail"]
    assert 'kind = "none"' in lacking.remedy


def test_the_open_tier_and_a_simulated_tee_are_told_as_what_they_are(tmp_path: Path) -> None:
    assert states(doctor_machine.tee(config(tmp_path))) == ["warn"]
    authority = tmp_path / "authority.json"
    simulated = config(tmp_path, kind="simulated", dev_authority_file=authority)
    assert states(doctor_machine.tee(simulated)) == ["fail"]
    authority.write_bytes(b"{}")
    assert "DEV ONLY" in doctor_machine.tee(simulated).found


@pytest.fixture
def smi(tmp_path: Path) -> Any:
    """Writes a program in the place of nvidia-smi: no GPU is asked here."""

    def write(script: str) -> str:
        place = tmp_path / "smi"
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(0o755)
        return str(place)

    return write


def test_a_gpu_is_told_with_its_driver_and_memory(tmp_path: Path, smi: Any) -> None:
    program = smi('echo "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 512"')
    found = doctor_machine.gpu(config(tmp_path), program)
    assert states(found) == ["ok"]
    assert found.found == "NVIDIA H100 80GB HBM3, driver 570.86.15, 512 of 81559 MiB in use"


@pytest.mark.parametrize("script", ["exit 9", "true"])
def test_a_driver_that_does_not_fit_is_a_failure(tmp_path: Path, smi: Any, script: str) -> None:
    assert states(doctor_machine.gpu(config(tmp_path), smi(script))) == ["fail"]


def test_no_gpu_matters_only_to_a_server_here(tmp_path: Path) -> None:
    local = model(engine="openai", url="http://127.0.0.1:8000/v1")
    assert states(doctor_machine.gpu(config(tmp_path), "no-such-program")) == ["ok"]
    assert states(doctor_machine.gpu(config(tmp_path, local), "no-such-program")) == ["warn"]


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    asked = config(tmp_path)
    assert states(doctor_machine.secret_files(asked)) == ["fail"]  # there is none
    asked.agent.seed_file.write_bytes(b"SU")
    asked.agent.seed_file.chmod(0o640)
    wide = doctor_machine.secret_files(asked)
    assert (states(wide), wide.remedy) == (["fail"], f"chmod 600 {asked.agent.seed_file}")
    asked.agent.seed_file.chmod(0o600)
    assert states(doctor_machine.secret_files(asked)) == ["ok"]
    shown = {"client_cert_file": tmp_path / "own.pem", "client_key_file": tmp_path / "own.key"}
    asked = config(tmp_path, model(engine="openai", url="https://engine.example/v1", **shown))
    shown["client_key_file"].write_bytes(b"")
    shown["client_key_file"].chmod(0o644)
    assert doctor_machine.secret_files(asked).remedy == f"chmod 600 {shown['client_key_file']}"


def test_the_data_folder_can_be_written_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert states(doctor_machine.data_folder(folder)) == ["ok"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    assert states(doctor_machine.data_folder(folder)) == ["warn"]
    (tmp_path / "file").write_bytes(b"")
    assert states(doctor_machine.data_folder(tmp_path / "file" / "data")) == ["fail"]


@pytest.mark.parametrize(
    ("free_mib", "state"), [(255, "fail"), (256, "warn"), (2047, "warn"), (2048, "ok")]
)
def test_a_full_disk_fails(tmp_path: Path, free_mib: int, state: str) -> None:
    assert states(doctor_machine.disk(tmp_path, free_mib * 2**20)) == [state]


_LISTENING = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_CORE, (int(sys.argv[1]), resource.RLIM_INFINITY))
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("limit", "state"), [(0, "ok"), (4096, "fail")])
def test_a_server_that_may_dump_core_is_found_by_its_port(
    tmp_path: Path, limit: int, state: str
) -> None:
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("core files are limited here already")
    plain, piped = tmp_path / "plain", tmp_path / "piped"
    plain.write_text("core\n")
    piped.write_text("|/usr/bin/keeps %p\n")
    with subprocess.Popen(
        [sys.executable, "-c", _LISTENING, str(limit)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        port = int(server.stdout.readline())
        served = model(engine="openai", url=f"http://127.0.0.1:{port}/v1")
        assert doctor_machine.listener(port) == server.pid
        assert states(doctor_machine.core_dumps(served, pattern_file=plain)) == [state]
        assert states(doctor_machine.core_dumps(served, pattern_file=piped)) == ["warn"]
        server.communicate()
    assert states(doctor_machine.core_dumps(served, pattern_file=plain)) == ["warn"]


def test_the_agent_itself_and_a_server_elsewhere_are_told_apart() -> None:
    far = model(engine="openai", url="https://gpu.example/v1")
    assert states(doctor_machine.core_dumps(model()), doctor_machine.core_dumps(far)) == [
        "ok", "warn",
    ]  # fmt: skip


# ---- what is served ----


async def test_the_shipped_model_is_hashed_and_answers() -> None:
    found = await doctor_models.examine(model())
    assert [one.check for one in found] == [
        "files of skills-1", "engine of skills-1", "test run of skills-1",
    ]  # fmt: skip
    assert states(*found) == ["ok", "ok", "ok"]
    assert "tokens/s" in found[2].found


async def test_files_that_differ_from_the_manifest_fail(tmp_path: Path) -> None:
    from cocoon.models.describing import describe_folder
    from cocoon.models.kept import keep

    folder = tmp_path / "model"
    folder.mkdir()
    for file in SHIPPED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    place = tmp_path / "manifest.json"
    keep(describe_folder(folder, "skills-1", engine="onnxruntime-cpu"), place)
    served = model(folder=folder, manifest_file=place)
    assert states(*await doctor_models.examine(served)) == ["ok", "ok", "ok"]
    (folder / "config.json").write_bytes(b"{}")
    found = await doctor_models.examine(served)
    assert states(*found) == ["fail"]
    assert "config.json" in found[0].found


@pytest.fixture
async def server() -> AsyncIterator[tuple[EngineServer, str]]:
    backend = OnnxBackend(SHIPPED_MODEL, queue_limit=4, randomness=SystemRandomness())
    await backend.start()
    try:
        served = EngineServer(backend, "served")
        async with served.serve() as url:
            yield served, url
    finally:
        await backend.close()


async def test_a_server_answers_a_real_question_or_the_run_fails(
    server: tuple[EngineServer, str],
) -> None:
    engine, url = server
    served = model(engine="openai", url=url, served_as="served", context_tokens=512)
    found = await doctor_models.examine(served)
    assert states(*found) == ["warn", "ok", "ok"]  # nobody looked at its files
    engine.fault = "500"
    assert states(*await doctor_models.examine(served))[-1] == "fail"


async def test_a_server_that_is_not_there_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    served = model(engine="openai", url=f"http://127.0.0.1:{port}/v1")
    assert states(*await doctor_models.examine(served)) == ["warn", "fail"]


# ---- the network ----


@pytest.mark.parametrize(
    ("off_ms", "round_trip_ms", "state"),
    [(0, 10, "ok"), (1000, 0, "ok"), (1001, 0, "warn"), (-1001, 0, "warn"), (1200, 600, "ok"),
     (10_001, 0, "fail"), (-10_001, 0, "fail"), (10_200, 600, "warn")],
)  # fmt: skip
def test_a_wrong_clock_is_told(off_ms: int, round_trip_ms: int, state: str) -> None:
    assert states(doctor_network.clock_finding(off_ms, round_trip_ms)) == [state]


def standing(**changes: object) -> Finding:
    told = {
        "provider_id": "prov_1", "enrolled": True, "tier": "simulated", "attested": True,
        "evidence_valid_until_ms": NOW_MS + 3_600_000, "listed": True, "banned": False,
        "revoked": None, "last_refusal": None, **changes,
    }  # fmt: skip
    return doctor_network.standing(told, NOW_MS)


def test_the_standing_is_told_with_what_to_do() -> None:
    refusal = {"code": "tcb_out_of_date", "message": "update the firmware", "at_ms": 1}
    assert states(
        standing(), standing(listed=False), standing(enrolled=False), standing(attested=False),
        standing(attested=False, last_refusal=refusal), standing(banned=True),
        standing(revoked={"reason": "expired", "at_ms": 1}),
        standing(evidence_valid_until_ms=NOW_MS + 1000),
    ) == ["ok", "ok", "warn", "warn", "fail", "fail", "fail", "warn"]  # fmt: skip
    assert "update the firmware" in standing(attested=False, last_refusal=refusal).found


def prices(*outputs: int) -> list[Prices]:
    return [Prices(1, 1, output) for output in outputs]


def test_a_price_is_told_beside_the_market() -> None:
    def at(output: int, *others: int) -> Finding:
        return doctor_network.price_finding("price", Prices(1, 1, output), prices(*others))

    assert states(at(80), at(80, 80), at(80, 70), at(80, 60, 65, 70)) == ["ok", "ok", "ok", "warn"]
    dear = at(401, 100)
    assert states(dear, at(400, 100)) == ["warn", "ok"]
    assert "at most 400 nanoTON" in dear.remedy


async def test_a_bus_that_is_away_or_a_key_that_is_missing_fails(tmp_path: Path) -> None:
    asked = config(tmp_path)
    (missing,) = await doctor_network.bus(asked)
    assert states(missing) == ["fail"]
    assert "init" in missing.remedy


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"urls": ["wss://bus.example:443", "tls://bus.example:444"], "ca_pem": "PEM"},
         'set [network] bus to ["wss://bus.example:443"] and ca_file to'),
        ({"urls": ["nats://127.0.0.1:2"], "ca_pem": None},
         'set [network] bus to ["nats://127.0.0.1:2"], and start'),
        ({"urls": ["nats://127.0.0.1:1"], "ca_pem": None}, "a firewall"),
        (None, "a firewall"),
    ],
)  # fmt: skip
async def test_a_bus_that_has_moved_is_where_the_gateway_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any] | None, said: str
) -> None:
    seed_file(tmp_path / "identity.seed", bytes(32))
    monkeypatch.setattr(doctor_network, "CONNECT_S", 0.2)
    with gateway_that_tells({"bus": told}) as url:
        plain = config(tmp_path)
        asked = plain.model_copy(update={
            "network": plain.network.model_copy(update={"gateway": url}),
        })  # fmt: skip
        (away,) = await doctor_network.bus(asked)
    assert away.state == "fail"
    assert said in away.remedy


@contextlib.contextmanager
def gateway_that_tells(document: dict[str, Any]) -> Iterator[str]:
    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(5)


def test_a_trust_file_that_is_missing_fails(tmp_path: Path) -> None:
    assert states(doctor_network.trust(config(tmp_path))) == ["fail"]


# ---- the whole ----


async def test_a_check_that_breaks_is_a_failure_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: AgentConfig) -> Finding:
        raise RuntimeError("a prompt could stand here")

    monkeypatch.setattr(doctor_machine, "gpu", broken)
    from cocoon.agent.writing import write_config

    write_config(config(tmp_path), tmp_path / "provider.toml")
    found = [one async for one in doctor.examine(tmp_path / "provider.toml", quick=True)]
    by_check = {one.check: one for one in found}
    assert by_check["gpu"].found == "the check itself broke (RuntimeError)"
    assert {"configuration", "tee", "trust", "bus"} <= by_check.keys()


async def test_without_a_file_it_says_so_and_looks_no_further(tmp_path: Path) -> None:
    found = [one async for one in doctor.examine(tmp_path / "none.toml")]
    assert states(*found) == ["fail"]
    assert os.fspath(tmp_path / "none.toml") in found[0].found
