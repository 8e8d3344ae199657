"""The adapter on llama.cpp: a real llama-cpp-python server with a tiny random model.

Needs a Python with `llama-cpp-python[server]` and `gguf`: what infra/llama-cpp-server.sh makes, or
the one that COCOON_TEST_LLAMA_CPP_PYTHON names. Skipped, saying so, where there is none.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from cocoon.chat import Capabilities
from cocoon.devnet.ports import free_port
from services.provider.backends.base import Backend
from services.provider.backends.openai_compatible import OpenAICompatibleBackend
from tests.contract.backend_contract import MODEL, BackendContract, collect, request

WRITER = Path(__file__).parents[1] / "support" / "tiny_gguf.py"
CONTEXT = 1024
START_TRIES = 300


def _python() -> str | None:
    named = os.environ.get("COCOON_TEST_LLAMA_CPP_PYTHON")
    made = Path(__file__).resolve().parents[2] / ".cocoon-llama"
    return named or (str(made / "bin" / "python") if (made / ".complete").exists() else None)


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = _python()
    if python is None:
        pytest.skip(
            "llama-cpp-python[server] is not built here; run infra/llama-cpp-server.sh once, or "
            "name a Python that has it in COCOON_TEST_LLAMA_CPP_PYTHON"
        )
    folder = tmp_path_factory.mktemp("llama")
    model, port = folder / "tiny.gguf", free_port()
    subprocess.run([python, str(WRITER), str(model)], check=True, timeout=60)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [
                python, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", MODEL,
                "--n_ctx", str(CONTEXT), "--host", "127.0.0.1", "--port", str(port),
                "--logits_all", "true",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


class TestLlamaCpp(BackendContract):
    @pytest.fixture
    async def backend(self, llama_server: str) -> AsyncIterator[Backend]:
        made = OpenAICompatibleBackend(
            llama_server, MODEL, context_tokens=CONTEXT, queue_limit=8,
            capabilities=Capabilities(penalties=True, seed=True),
        )  # fmt: skip
        for _ in range(START_TRIES):
            if await made.healthy():
                break
            await asyncio.sleep(0.1)
        await made.start()
        yield made
        await made.close()

    async def test_its_counts_are_those_of_a_whole_answer(
        self, backend: Backend, llama_server: str
    ) -> None:
        _, outputs = await collect(backend, request(temperature=0), max_output=7)
        body = {
            "model": MODEL, "temperature": 0, "max_tokens": 7,
            "messages": [{"role": "user", "content": "Count from 1 to 9"}],
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=llama_server, timeout=60) as client:
            answer = (await client.post("/v1/chat/completions", json=body)).json()
        usage = outputs[-1].usage  # type: ignore[union-attr]
        assert usage.prompt == answer["usage"]["prompt_tokens"]
        assert usage.completion == answer["usage"]["completion_tokens"] == 7
