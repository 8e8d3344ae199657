"""The Triton backend keeps the backends' contract on a real tritonserver, and survives bad ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest

from cocoon.chat import Capabilities
from cocoon.devnet.triton_server import CAPABILITIES, CONTEXT_TOKENS, TritonServer
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import (
    BadRequest,
    ConfigurationError,
    DeadlineExceeded,
    RateLimited,
    Unavailable,
)
from services.provider.backends.base import Backend, EngineLoad, Piece, Started
from services.provider.backends.making import EngineSettings
from services.provider.backends.probing import Level, probe
from services.provider.backends.triton import TritonBackend
from tests.contract.backend_contract import MODEL, BackendContract, collect, request
from tests.support.cutting_proxy import cutting
from tests.support.triton import triton_metric, triton_server

RUNNING = f'cocoon_engine_running{{model="{MODEL}"}}'
STEPS = f'cocoon_engine_steps{{model="{MODEL}"}}'
CANCELLED = f'cocoon_engine_answers{{model="{MODEL}",outcome="cancelled"}}'
STOPPED = f'cocoon_engine_answers{{model="{MODEL}",outcome="stopped"}}'
ENDLESS: dict[str, Any] = {
    "temperature": 0, "logit_bias": {str(token): -100 for token in range(256, 260)}
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with triton_server(tmp_path_factory.mktemp("triton")) as found:
        yield found


def made(server: TritonServer, model: str = MODEL, **changed: Any) -> TritonBackend:
    settings: dict[str, Any] = {
        "context_tokens": CONTEXT_TOKENS,
        "capabilities": Capabilities(**dict.fromkeys(CAPABILITIES, True)),
        "queue_limit": 8,
        "randomness": SystemRandomness(),
        "load": EngineLoad(),
        "metrics_url": server.metrics_url,
    }
    return TritonBackend(changed.pop("url", server.url), model, **{**settings, **changed})


async def until(server: TritonServer, name: str, wanted: float) -> None:
    for _ in range(500):
        if triton_metric(server.metrics_url, name) == wanted:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"{name} is not {wanted} but {triton_metric(server.metrics_url, name)}")


class TestTritonBackend(BackendContract):
    @pytest.fixture
    async def backend(self, server: TritonServer) -> AsyncIterator[Backend]:
        backend = made(server)
        await backend.start()
        yield backend
        await backend.close()

    async def test_leaving_stops_the_engine_in_the_server(
        self, server: TritonServer, backend: Backend
    ) -> None:
        await until(server, RUNNING, 0)
        before = triton_metric(server.metrics_url, STOPPED)
        outputs = backend.generate(request(**ENDLESS), max_input_tokens=400, max_output_tokens=600)
        async for output in outputs:
            if isinstance(output, Piece):
                break
        await outputs.aclose()
        await until(server, STOPPED, before + 1)
        await until(server, RUNNING, 0)
        steps = triton_metric(server.metrics_url, STEPS)
        await asyncio.sleep(0.2)
        assert triton_metric(server.metrics_url, STEPS) == steps

    async def test_a_deadline_ends_the_answer_and_the_engine(self, server: TritonServer) -> None:
        backend = made(server, deadline_s=0.2)
        await backend.start()
        before = triton_metric(server.metrics_url, STOPPED)
        with pytest.raises(DeadlineExceeded):
            await collect(backend, request(**ENDLESS), max_output=600)
        await until(server, STOPPED, before + 1)
        await backend.close()

    async def test_an_agent_that_is_cut_off_stops_its_answers(self, server: TritonServer) -> None:
        before = triton_metric(server.metrics_url, CANCELLED)
        with cutting(server.url.replace("grpc", "http")) as line:
            backend = made(server, url=line.url.replace("http", "grpc"))
            await backend.start()
            running = [  # of different lengths, so that they share no step and take a while
                backend.generate(
                    request("x" * length, **ENDLESS), max_input_tokens=400, max_output_tokens=600
                )
                for length in range(8)
            ]
            for outputs in running:
                await anext(outputs)
        for outputs in running:
            with pytest.raises(Unavailable):
                async for _ in outputs:
                    pass
        await backend.close()
        await until(server, RUNNING, 0)
        assert triton_metric(server.metrics_url, CANCELLED) > before

    async def test_many_who_leave_do_no_harm_to_those_who_stay(
        self, server: TritonServer, backend: Backend
    ) -> None:
        async def leave(after: int) -> None:
            outputs = backend.generate(request(), max_input_tokens=400, max_output_tokens=200)
            async for output in outputs:
                after -= isinstance(output, Piece)
                if after <= 0:
                    break
            await outputs.aclose()

        pid = server.pid
        for turn in range(20):
            staying = asyncio.create_task(collect(backend, request("Reverse: cocoon")))
            await asyncio.gather(*(leave(turn % 10 + other) for other in range(7)))
            assert (await staying)[0] == "noococ"
        assert server.pid == pid is not None

    async def test_a_second_cancellation_does_not_cut_the_stream(
        self, server: TritonServer, backend: Backend
    ) -> None:
        before = triton_metric(server.metrics_url, STOPPED)
        task = asyncio.create_task(collect(backend, request(**ENDLESS), max_output=600))
        await until(server, RUNNING, 1)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(server, STOPPED, before + 1)
        assert (await collect(backend, request("Reverse: cocoon")))[0] == "noococ"

    async def test_pieces_come_one_by_one_after_the_prompts_count(self, backend: Backend) -> None:
        _, outputs = await collect(backend, request(temperature=0))
        pieces = [output for output in outputs if isinstance(output, Piece)]
        assert isinstance(outputs[0], Started)
        assert outputs[0].prompt_tokens
        assert len(pieces) > 5
        assert outputs[-1].usage.completion == sum(piece.tokens for piece in pieces)  # type: ignore[union-attr]

    async def test_it_answers_what_the_embedded_engine_answers(self, backend: Backend) -> None:
        assert (await collect(backend, request("Reverse: cocoon")))[0] == "noococ"

    async def test_a_full_queue_is_busy(self, backend: Backend) -> None:
        waiting = [
            backend.generate(request(**ENDLESS), max_input_tokens=400, max_output_tokens=600)
            for _ in range(8)
        ]
        for outputs in waiting:
            await anext(outputs)
        with pytest.raises(RateLimited):
            await collect(backend, request())
        for outputs in waiting:
            await outputs.aclose()
        await collect(backend, request())

    async def test_the_servers_own_refusal_is_ours_without_its_text(self, backend: Backend) -> None:
        with pytest.raises(BadRequest) as caught:
            await collect(backend, request("canary", logit_bias={"99999": 1}))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "logit_bias")
        assert "canary" not in caught.value.message

    async def test_what_others_ask_of_the_server_is_its_load(self, server: TritonServer) -> None:
        load, own = EngineLoad(), EngineLoad()
        mine, other = made(server, load=load, queue_limit=2), made(server, load=own)
        await mine.start()
        await other.start()
        await until(server, RUNNING, 0)
        assert await mine.healthy()
        assert load.elsewhere == 0
        running = [
            other.generate(request(**ENDLESS), max_input_tokens=400, max_output_tokens=600)
            for _ in range(2)
        ]
        for outputs in running:
            await anext(outputs)
        await until(server, RUNNING, 2)
        assert not await mine.healthy()  # its two places are taken
        assert load.elsewhere == 2
        assert await other.healthy()
        assert own.elsewhere == 0
        for outputs in running:
            await outputs.aclose()
        await until(server, RUNNING, 0)
        assert await mine.healthy()
        await mine.close()
        await other.close()

    async def test_a_server_without_the_model_is_not_started_on(self, server: TritonServer) -> None:
        backend = made(server, "other")
        with pytest.raises(Unavailable):
            await backend.start()
        await backend.close()

    async def test_a_model_with_less_context_than_offered_is_refused(
        self, server: TritonServer
    ) -> None:
        backend = made(server, context_tokens=CONTEXT_TOKENS + 1)
        with pytest.raises(ConfigurationError):
            await backend.start()
        await backend.close()

    async def test_closing_ends_what_runs(self, server: TritonServer) -> None:
        backend = made(server)
        await backend.start()
        outputs = backend.generate(request(**ENDLESS), max_input_tokens=400, max_output_tokens=600)
        await anext(outputs)
        await backend.close()
        with pytest.raises(Unavailable):
            async for _ in outputs:
                pass

    async def test_probing_sees_that_it_writes_nothing_down(self, server: TritonServer) -> None:
        found = await probe(EngineSettings("triton", url=server.url, model=MODEL))
        assert [one.level for one in found] == [Level.OK] * 3, found

    def test_its_log_holds_no_prompt(self, server: TritonServer) -> None:
        log = server.log_file.read_text()
        assert "GRPCInferenceService" in log
        assert "Count from" not in log
        assert "canary" not in log

    def test_the_memory_where_prompts_pass_is_its_owners_alone(self, server: TritonServer) -> None:
        assert server.shared_memory()
        assert all(region.stat().st_mode & 0o777 == 0o600 for region in server.shared_memory())

    def test_its_other_doors_are_shut(self, server: TritonServer) -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("grpc", "http") + "/v2/health/ready", trust_env=False)


async def test_a_server_that_dies_is_unavailable_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with triton_server(tmp_path_factory.mktemp("triton")) as server:
        backend = made(server)
        await backend.start()
        outputs = backend.generate(request(**ENDLESS), max_input_tokens=400, max_output_tokens=600)
        await anext(outputs)
        assert server.pid is not None
        process = psutil.Process(server.pid)
        models = process.children(recursive=True)
        process.kill()
        with pytest.raises(Unavailable) as caught:
            async for _ in outputs:
                pass
        assert caught.value.code == "engine_failed"
        assert not await backend.healthy()
        assert models
        for model in models:
            model.wait(10)  # nobody is left with the model and the prompts
        left = server.shared_memory()
        server.start()
        assert not any(region.exists() for region in left)
        for _ in range(200):
            if await backend.healthy():
                break
            await asyncio.sleep(0.05)
        assert (await collect(backend, request("Reverse: cocoon")))[0] == "noococ"
        await backend.close()
