"""Counts that an engine's server tells apart arrive apart in the receipt, and are priced so."""

from __future__ import annotations

import pytest

from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.money import ceil_div
from cocoon.sealing import Profile
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.support.engine_server import EngineServer
from tests.support.provider_world import ProviderWorld


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_and_reasoning_tokens_are_in_the_receipt_and_in_its_price(
    world: ProviderWorld, stream: bool
) -> None:
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=8, randomness=SystemRandomness())
    await engine.start()
    server = EngineServer(engine, "skills-1")
    server.usage = {
        "prompt_tokens": 40, "completion_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 25},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }  # fmt: skip
    try:
        async with (
            server.serve() as url,
            world.agent(backend_url=url, backend_context_tokens=640),
        ):
            answer = await world.ask(stream=stream, profile=Profile.P3)
            receipt, quote = answer.receipt, world.quote()
            assert (receipt.input_tokens, receipt.cached_input_tokens) == (40, 25)
            assert (receipt.output_tokens, receipt.reasoning_tokens) == (30, 20)
            assert quote.cached_input_nanoton_per_mtok < quote.input_nanoton_per_mtok
            assert receipt.price_nanoton == ceil_div(
                15 * quote.input_nanoton_per_mtok
                + 25 * quote.cached_input_nanoton_per_mtok
                + 30 * quote.output_nanoton_per_mtok,
                1_000_000,
            )
            assert answer.usage is not None
            assert answer.usage["prompt_tokens_details"]["cached_tokens"] == 25
            assert answer.usage["completion_tokens_details"]["reasoning_tokens"] == 20
    finally:
        await engine.close()
