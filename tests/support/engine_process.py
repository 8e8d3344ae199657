"""An OpenAI-compatible server in a process of its own, that a test may kill and start again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

from cocoon.devnet.ports import free_port
from cocoon.kernel.clock import SystemRandomness
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.support.engine_server import EngineServer

MODEL = "served-name"


class EngineProcess:
    """Always on the same port."""

    def __init__(self) -> None:
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.engine_process", str(self._port),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert await asyncio.wait_for(self._process.stdout.readline(), 60)

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


@contextlib.asynccontextmanager
async def engine_process() -> AsyncIterator[EngineProcess]:
    engine = EngineProcess()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.kill()


async def _serve(port: int) -> None:
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=16, randomness=SystemRandomness())
    await engine.start()
    async with EngineServer(engine, MODEL).serve(port) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
