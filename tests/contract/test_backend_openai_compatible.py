"""The adapter for OpenAI-compatible servers keeps the backends' contract, and survives bad ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from cocoon.chat import Capabilities, TokenUsage
from cocoon.devnet.ports import free_port
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import BadRequest, CocoonError, RateLimited, Unavailable
from services.provider.backends.base import Backend, Ended, Piece, Started
from services.provider.backends.onnx import OnnxBackend
from services.provider.backends.openai_compatible import OpenAICompatibleBackend
from services.provider.settings import SHIPPED_MODEL
from tests.contract.backend_contract import (
    MODEL,
    BackendContract,
    collect,
    completion,
    request,
)
from tests.support.engine_server import EngineServer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a server's state has no event
            await asyncio.sleep(0.02)


async def refused(url: str, said: str) -> None:
    """That the adapter for the model foo does not start here, and what it says."""
    made = OpenAICompatibleBackend(
        url, "foo", context_tokens=640, queue_limit=1, capabilities=Capabilities()
    )
    with pytest.raises(Unavailable) as caught:
        await made.start()
    await made.close()
    assert said in caught.value.message


class TestOpenAICompatibleBackend(BackendContract):
    @pytest.fixture
    async def server(self) -> AsyncIterator[tuple[EngineServer, str]]:
        engine = OnnxBackend(SHIPPED_MODEL, queue_limit=64, randomness=SystemRandomness())
        await engine.start()
        server = EngineServer(engine, MODEL)
        async with server.serve() as url:
            yield server, url
        await engine.close()

    @pytest.fixture
    async def backend(self, server: tuple[EngineServer, str]) -> AsyncIterator[Backend]:
        made = OpenAICompatibleBackend(
            server[1], MODEL, context_tokens=640, queue_limit=8,
            capabilities=Capabilities(logprobs=True, logit_bias=True, penalties=True, seed=True),
        )  # fmt: skip
        await made.start()
        yield made
        await made.close()

    @pytest.mark.parametrize(
        ("fault", "error", "code"),
        [
            ("400", BadRequest, "named_code"),
            ("422", BadRequest, "named_code"),
            ("429", RateLimited, "busy"),
            ("500", Unavailable, "engine_failed"),
            ("503", Unavailable, "engine_failed"),
            ("cut", Unavailable, "engine_failed"),
            ("garbage", Unavailable, "engine_failed"),
            ("no_usage", Unavailable, "engine_failed"),
        ],
    )
    async def test_a_failing_server_is_an_error_without_its_text(
        self, server: tuple[EngineServer, str], backend: Backend, fault: str,
        error: type[CocoonError], code: str,
    ) -> None:  # fmt: skip
        server[0].fault = fault
        with pytest.raises(error) as caught:
            await collect(backend, request())
        assert caught.value.code == code
        assert "quotes" not in caught.value.message
        server[0].fault = ""
        await collect(backend, request())

    @pytest.mark.parametrize("stream", [True, False])
    async def test_leaving_stops_the_server_too(
        self, server: tuple[EngineServer, str], backend: Backend, stream: bool
    ) -> None:
        endless = {str(token): -100 for token in range(256, 260)}
        outputs = backend.generate(
            request(logit_bias=endless, stream=stream), max_input_tokens=400, max_output_tokens=600
        )

        async def read() -> None:
            async for output in outputs:
                if stream and isinstance(output, Piece):
                    return

        reading = asyncio.create_task(read())
        await until(lambda: server[0].running == 1)
        if stream:
            await reading
        reading.cancel()
        await asyncio.wait({reading})
        await outputs.aclose()
        await until(lambda: server[0].running == 0)

    async def test_who_wants_one_body_gets_it_as_one_body_of_the_servers(
        self, server: tuple[EngineServer, str], backend: Backend
    ) -> None:
        told, _ = await collect(backend, request(temperature=0))
        text, outputs = await collect(backend, request(temperature=0, stream=False))
        assert "stream" not in server[0].bodies[-1]
        assert [type(output) for output in outputs] == [Started, Piece, Ended]
        assert text == told

    async def test_one_body_may_take_longer_than_a_stream_may_be_silent(
        self, server: tuple[EngineServer, str]
    ) -> None:
        made = OpenAICompatibleBackend(
            server[1], MODEL, context_tokens=640, queue_limit=8, read_timeout_s=0.05,
            deadline_s=60.0, capabilities=Capabilities(),
        )  # fmt: skip
        server[0].fault = "late"
        with pytest.raises(Unavailable):
            await collect(made, request(temperature=0))
        assert (await collect(made, request(temperature=0, stream=False)))[0]
        await made.close()

    async def test_only_what_was_asked_is_passed_on(
        self, server: tuple[EngineServer, str], backend: Backend
    ) -> None:
        await collect(backend, request(user="me", metadata={"a": "b"}, temperature=0))
        body = server[0].bodies[-1]
        assert set(body) == {
            "model", "messages", "temperature", "max_tokens", "stream", "stream_options",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("told", "said"),
        [
            (
                b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
                "answers 404 when it is asked",
            ),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "does not list models as an"),
            (b"", "does not answer (the connection broke)"),
        ],
    )
    async def test_something_else_at_the_address_is_told(self, told: bytes, said: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(told)
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            await refused(url, f"{url}/v1 {said}" if "list" not in said else said)

    async def test_nothing_at_the_address_is_told_apart_from_another_model(
        self, server: tuple[EngineServer, str]
    ) -> None:
        nowhere = f"http://127.0.0.1:{free_port()}"
        said = "does not answer (connection refused); start it first"
        await refused(nowhere, f"the engine's server {nowhere}/v1 {said}")
        said = f"answers, but does not serve the model foo; it serves {MODEL}"
        await refused(server[1], f"{server[1].removesuffix('/v1')}/v1 {said}")

    async def test_cached_and_thought_tokens_are_counted_apart(
        self, server: tuple[EngineServer, str], backend: Backend
    ) -> None:
        server[0].usage = {
            "prompt_tokens": 9, "completion_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 5},
            "completion_tokens_details": {"reasoning_tokens": 3},
        }  # fmt: skip
        for asked in (request(), request(stream=False), completion(), completion(stream=False)):
            _, outputs = await collect(backend, asked)
            ended = outputs[-1]
            assert isinstance(ended, Ended)
            assert ended.usage == TokenUsage(prompt=9, completion=8, cached=5, reasoning=3)

    async def test_a_server_that_knows_no_completions_refuses_them_by_name(
        self, server: tuple[EngineServer, str], backend: Backend
    ) -> None:
        server[0].completes = False
        with pytest.raises(BadRequest) as caught:
            await collect(backend, completion())
        assert caught.value.code == "wrong_endpoint"
        assert (await collect(backend, request(temperature=0)))[0]

    async def test_a_server_without_the_model_is_not_started_on(
        self, server: tuple[EngineServer, str]
    ) -> None:
        other = OpenAICompatibleBackend(
            server[1], "other", context_tokens=640, queue_limit=1, capabilities=Capabilities()
        )
        with pytest.raises(Unavailable):
            await other.start()
        await other.close()


class TestServerWithoutCountsInStreams(BackendContract):
    """Such a server is asked for whole answers, so that counts are its own and exact."""

    @pytest.fixture
    async def server(self) -> AsyncIterator[tuple[EngineServer, str]]:
        engine = OnnxBackend(SHIPPED_MODEL, queue_limit=64, randomness=SystemRandomness())
        await engine.start()
        server = EngineServer(engine, MODEL)
        server.counts_streams = False
        async with server.serve() as url:
            yield server, url
        await engine.close()

    @pytest.fixture
    async def backend(self, server: tuple[EngineServer, str]) -> AsyncIterator[Backend]:
        made = OpenAICompatibleBackend(
            server[1], MODEL, context_tokens=640, queue_limit=8,
            capabilities=Capabilities(logprobs=True, logit_bias=True, penalties=True, seed=True),
        )  # fmt: skip
        await made.start()
        yield made
        await made.close()

    @pytest.mark.parametrize("fault", ["garbage", "no_usage", "500"])
    async def test_a_failing_server_is_an_error(
        self, server: tuple[EngineServer, str], backend: Backend, fault: str
    ) -> None:
        assert "stream" in server[0].bodies[0]
        server[0].fault = fault
        with pytest.raises(Unavailable):
            await collect(backend, request())
        assert "stream" not in server[0].bodies[-1]
