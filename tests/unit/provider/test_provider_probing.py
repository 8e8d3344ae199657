"""What is seen of an engine's hop and of its server's logging, and what is said of it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from cocoon.devnet.ports import free_port
from services.provider.backends.making import EngineSettings
from services.provider.backends.probing import (
    Level,
    hop,
    log_settings,
    logging_of,
    probe,
    trace_settings,
)


@pytest.mark.parametrize(
    ("command", "environment", "level", "said"),
    [
        (["vllm", "serve", "m"], {}, Level.UNKNOWN, "older versions"),
        (["vllm", "serve", "m", "--no-enable-log-requests"], {}, Level.OK, "no log of requests"),
        (
            ["python", "-m", "vllm.entrypoints.openai.api_server", "--disable-log-requests"],
            {}, Level.OK, "",
        ),
        (["/usr/bin/python3", "/opt/bin/vllm", "serve", "--enable-log-requests"], {}, Level.WRONG,
         "--enable-log-requests"),
        (["vllm", "serve", "--no-enable-log-requests"], {"VLLM_LOGGING_LEVEL": "DEBUG"},
         Level.WRONG, "VLLM_LOGGING_LEVEL"),
        (["python", "-m", "sglang.launch_server", "--log-requests"], {}, Level.WRONG, ""),
        (["python", "-m", "sglang.launch_server", "--model", "x"], {}, Level.OK, ""),
        (["./llama-server", "-m", "x.gguf"], {}, Level.OK, ""),
        (["./llama-server", "-m", "x.gguf", "-v"], {}, Level.WRONG, "-v"),
        (["python", "-m", "llama_cpp.server", "--verbose=true"], {}, Level.WRONG, ""),
        (["ollama", "serve"], {}, Level.OK, ""),
        (["ollama", "serve"], {"OLLAMA_DEBUG": "1"}, Level.WRONG, "OLLAMA_DEBUG"),
        (["my-server", "--model", "llama.gguf"], {}, Level.UNKNOWN, "no server whose options"),
        ([], {}, Level.UNKNOWN, ""),
    ],
)  # fmt: skip
def test_a_command_line_says_whether_prompts_are_logged(
    command: list[str], environment: dict[str, str], level: Level, said: str
) -> None:
    found = logging_of(command, environment)
    assert found.level is level
    assert said in found.says
    assert bool(found.remedy) == (level is not Level.OK)


def settings(url: str, **changes: Any) -> EngineSettings:
    return EngineSettings(**{"engine": "openai", "url": url, "model": "m", **changes})


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        (settings("http://127.0.0.1:8000/v1"), Level.OK),
        (settings("http://[::1]:8000"), Level.OK),
        (settings("http://10.0.0.5:8000/v1"), Level.WRONG),
        (settings("http://example.org"), Level.WRONG),
        (settings("https://example.org/v1"), Level.UNKNOWN),
        (settings("https://127.0.0.1:8000/v1"), Level.OK),
        (
            settings(
                "https://example.org/v1", client_cert_file=Path("c"), client_key_file=Path("k")
            ),
            Level.OK,
        ),
        (settings("https://example.org/v1", client_cert_file=Path("c")), Level.WRONG),
        (
            settings("http://127.0.0.1:1", client_cert_file=Path("c"), client_key_file=Path("k")),
            Level.WRONG,
        ),
        (settings("grpc://127.0.0.1:8001", engine="triton"), Level.OK),
        (settings("grpc://10.0.0.5:8001", engine="triton"), Level.WRONG),
        (settings("grpcs://triton.example:8001", engine="triton"), Level.UNKNOWN),
    ],
)
def test_the_hop_is_loopback_or_tls(asked: EngineSettings, level: Level) -> None:
    found = hop(asked)
    assert found.level is level
    assert bool(found.remedy) == (level is not Level.OK)


@pytest.mark.parametrize(
    ("told", "level"),
    [
        ({"log_verbose_level": {"uint32Param": 0}}, Level.OK),
        ({"log_verbose_level": {"uint32Param": 3}}, Level.WRONG),
        ({"log_verbose_level": 1}, Level.WRONG),
        ({}, Level.OK),
        (None, Level.UNKNOWN),
    ],
)
def test_tritons_log_settings_are_read(told: dict[str, Any] | None, level: Level) -> None:
    assert log_settings(told).level is level


@pytest.mark.parametrize(
    ("told", "level"),
    [
        ({"trace_level": {"value": ["OFF"]}}, Level.OK),
        ({"trace_level": {"value": ["TIMESTAMPS"]}}, Level.OK),
        ({"trace_level": {"value": ["TIMESTAMPS", "TENSORS"]}}, Level.WRONG),
        ({"trace_level": "tensors"}, Level.WRONG),
        (None, Level.UNKNOWN),
    ],
)
def test_tritons_trace_settings_are_read(told: dict[str, Any] | None, level: Level) -> None:
    assert trace_settings(told).level is level


def test_a_shut_door_is_right_where_the_process_says_so() -> None:
    quiet = [(["tritonserver", "--log-verbose=0"], {})]
    assert log_settings(None, quiet).level is Level.OK
    assert trace_settings(None, quiet).level is Level.OK
    loud = [(["tritonserver", "--log-verbose", "2", "--trace-config", "level=TENSORS"], {})]
    assert log_settings(None, loud).level is Level.WRONG
    assert trace_settings(None, loud).level is Level.WRONG


async def test_the_process_that_listens_is_found_and_its_options_read(tmp_path: Path) -> None:
    """A real process by the name of vllm, which listens and says that it logs requests."""
    port = free_port()
    program = tmp_path / "vllm"
    program.write_text(
        "import http.server, sys\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), http.server.BaseHTTPRequestHandler)"
        ".serve_forever()\n"
    )
    command = [sys.executable, str(program), "serve", "--enable-log-requests"]
    asked = settings(f"http://127.0.0.1:{port}/v1")
    server = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        for _ in range(500):
            found = {one.name: one for one in await probe(asked)}
            if "request logging of vllm" in found:
                break
        assert found["hop"].level is Level.OK
        assert found["request logging of vllm"].level is Level.WRONG
        assert "--enable-log-requests" in found["request logging of vllm"].remedy
        assert found["server"].level is Level.UNKNOWN
    finally:
        server.kill()
        await server.wait()


async def test_nobody_at_the_address_is_told_and_never_raises() -> None:
    found = await probe(settings(f"http://127.0.0.1:{free_port()}/v1"))
    assert [one.level for one in found] == [Level.OK, Level.UNKNOWN, Level.UNKNOWN]


async def test_an_address_that_is_not_private_is_not_asked_anything() -> None:
    assert [one.level for one in await probe(settings("http://192.0.2.1:1/v1"))] == [Level.WRONG]


async def test_the_embedded_engine_has_no_hop() -> None:
    (found,) = await probe(EngineSettings("embedded"))
    assert found.level is Level.OK
