"""Embeddings through a real agent with the real MiniLM, over a real NATS."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cocoon.chat.embeddings import unpack_base64
from cocoon.devnet import minilm
from cocoon.sealing import Profile, Status
from tests.support.minilm import need_minilm
from tests.support.provider_world import Opened, ProviderWorld


def served() -> dict[str, Any]:
    return {"model_dir": need_minilm(), "model_manifest_file": minilm.MANIFEST}


async def embed(
    world: ProviderWorld, texts: Any, *, max_input: int = 4096, profile: Profile | None = None,
    **asked: Any,
) -> Opened:  # fmt: skip
    body = {"model": minilm.NAME, "input": texts, **asked}
    return await world.ask(
        endpoint="/v1/embeddings", body=json.dumps(body).encode(), max_input=max_input,
        max_output=0, profile=profile,
    )  # fmt: skip


async def test_vectors_come_sealed_with_a_receipt_for_input_alone(world: ProviderWorld) -> None:
    async with world.agent(**served()):
        offer = world.offer
        assert offer is not None
        assert (offer.name, offer.context_tokens) == (minilm.NAME, 65_536)
        answer = await embed(world, ["one", "two"], encoding_format="base64")
        told = json.loads(b"".join(answer.data))
        assert [len(unpack_base64(item["embedding"])) for item in told["data"]] == [1536, 1536]
        assert told["usage"] == answer.usage == {"prompt_tokens": 6, "total_tokens": 6}
        receipt = answer.receipt
        assert (receipt.status, receipt.input_tokens, receipt.output_tokens) == (
            Status.COMPLETE, 64, 0,
        )  # fmt: skip
        assert receipt.opened_ms <= receipt.first_ms <= receipt.last_ms
        exact = await embed(world, ["one", "two"], profile=Profile.P3)
        assert exact.receipt.input_tokens == 6


async def test_refusals_from_inside_are_sealed_and_free(world: ProviderWorld) -> None:
    async with world.agent(**served(), job_max_bytes=2**17):
        cases: list[tuple[dict[str, Any], str, str]] = [
            ({"texts": "word " * 300}, "input", "context_length_exceeded"),
            ({"texts": ["a b c"] * 9, "max_input": 40}, "input", "context_length_exceeded"),
            ({"texts": ["a"] * 20}, "input", "too_many_inputs"),
            ({"texts": "a", "dimensions": 128}, "dimensions", "unsupported_value"),
            ({"texts": [1, 2]}, "input", "unsupported_value"),
            ({"texts": "a", "model": "other"}, "model", "model_not_found"),
        ]
        for options, param, code in cases:
            answer = await embed(world, **options)
            assert answer.error is not None, options
            assert (answer.error["param"], answer.error["code"]) == (param, code)
            assert (answer.receipt.status, answer.receipt.price_nanoton) == (Status.REFUSED, 0)
        smaller = await embed(world, ["a"] * 20, encoding_format="base64")
        assert smaller.receipt.status is Status.COMPLETE


async def test_an_answer_that_is_as_large_as_may_be_arrives(world: ProviderWorld) -> None:
    async with world.agent(**served()):
        answer = await embed(world, [f"text {number}" for number in range(400)], max_input=9000)
        told = json.loads(b"".join(answer.data))
        assert [item["index"] for item in told["data"]] == list(range(400))


async def test_a_cancelled_job_stops_and_is_free(world: ProviderWorld) -> None:
    async with world.agent(**served()):
        body = json.dumps({"model": minilm.NAME, "input": ["word " * 250] * 200}).encode()
        job = await world.accepted(
            world.seal(endpoint="/v1/embeddings", body=body, max_input=60_000, max_output=0)
        )
        await asyncio.sleep(0.05)
        await world.cancel(job)
        answer = await world.ended(job)
        assert (answer.receipt.status, answer.receipt.price_nanoton) == (Status.CANCELLED, 0)
        assert (await embed(world, "x")).receipt.status is Status.COMPLETE
