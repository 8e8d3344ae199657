"""The doctor tells what an engine's server writes down, as far as it is seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cocoon.agent.config import ModelConfig
from services.provider.doctor_logging import request_logging

PRICE = {"input": 20, "cached_input": 10, "output": 80}
_LISTENING = """
import socket, sys
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


async def of_server(tmp_path: Path, *options: str) -> dict[str, str]:
    """What is found of a process that is called and told as a server is."""
    program = tmp_path / "vllm"
    program.write_text(_LISTENING)
    with subprocess.Popen(  # noqa: ASYNC220 - a server stands behind it
        [sys.executable, str(program), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        port = int(server.stdout.readline())
        model = ModelConfig.model_validate(
            {"name": "large", "price": PRICE, "engine": "openai",
             "url": f"http://127.0.0.1:{port}/v1"}
        )  # fmt: skip
        found = await request_logging(model)
        server.communicate()
    return {one.check: one.state for one in found}


async def test_a_server_that_logs_requests_fails_and_one_that_does_not_passes(
    tmp_path: Path,
) -> None:
    name = "request logging of vllm (large)"
    assert (await of_server(tmp_path, "--enable-log-requests"))[name] == "fail"
    assert (await of_server(tmp_path, "--no-enable-log-requests"))[name] == "ok"
    assert (await of_server(tmp_path))[name] == "warn"


async def test_the_embedded_engine_has_no_hop() -> None:
    model = ModelConfig.model_validate({"name": "skills-1", "price": PRICE})
    assert [one.state for one in await request_logging(model)] == ["ok"]
