"""What every engine for embeddings must do for the agent: one suite, subclassed once for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cocoon.chat import EmbeddingRequest, parse_embedding_request
from cocoon.chat.embeddings import floats
from cocoon.kernel.errors import BadRequest, CocoonError
from services.provider.backends.base import Embedder

MODEL = "all-minilm-l6-v2"
LOVELY, SUNNY, DROVE = (
    "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.",
)  # fmt: skip


def request(*texts: str, **parameters: Any) -> EmbeddingRequest:
    return parse_embedding_request({"model": MODEL, "input": list(texts), **parameters})


async def vectors(embedder: Embedder, *texts: str) -> list[list[float]]:
    made = await embedder.embed(request(*texts), max_input_tokens=60_000)
    return [floats(vector) for vector in made.vectors]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


class EmbedderContract:
    """A subclass gives `embedder`, started, on all-MiniLM-L6-v2."""

    @pytest.fixture
    async def embedder(self) -> AsyncIterator[Embedder]:
        raise NotImplementedError
        yield  # noqa: PT022 - the subclasses' fixtures close what they give

    async def test_a_vector_for_each_input_in_their_order(self, embedder: Embedder) -> None:
        texts = ["one", "a much longer text of more words than the others have", "two", "one"]
        together = await vectors(embedder, *texts)
        assert [len(vector) for vector in together] == [embedder.dimensions] * 4
        alone = [(await vectors(embedder, text))[0] for text in texts]
        for one, other in zip(together, alone, strict=True):
            assert cosine(one, other) > 0.9999
        assert cosine(together[0], together[3]) > 0.9999
        assert cosine(together[0], together[2]) < 0.99

    async def test_vectors_have_length_one(self, embedder: Embedder) -> None:
        for vector in await vectors(embedder, "x", LOVELY, "word " * 200):
            assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)

    async def test_alike_texts_are_near_as_the_model_was_published(
        self, embedder: Embedder
    ) -> None:
        """The similarities that the makers of the model print in their documentation."""
        lovely, sunny, drove = await vectors(embedder, LOVELY, SUNNY, DROVE)
        assert cosine(lovely, sunny) == pytest.approx(0.6660, abs=0.01)
        assert cosine(lovely, drove) == pytest.approx(0.1046, abs=0.01)
        assert cosine(sunny, drove) == pytest.approx(0.1411, abs=0.01)

    async def test_tokens_are_counted_with_what_stands_around_each_input(
        self, embedder: Embedder
    ) -> None:
        made = await embedder.embed(request("hello", "hello world"), max_input_tokens=60_000)
        assert (made.usage.prompt, made.usage.completion) == (3 + 4, 0)

    async def test_what_is_too_long_is_refused_and_never_cut(self, embedder: Embedder) -> None:
        fits = "word " * (embedder.context_tokens - 2)
        made = await embedder.embed(request(fits), max_input_tokens=60_000)
        assert made.usage.prompt == embedder.context_tokens
        with pytest.raises(BadRequest) as caught:
            await embedder.embed(request("x", "canary " + fits), max_input_tokens=60_000)
        assert caught.value.code == "context_length_exceeded"
        assert "canary" not in caught.value.message

    async def test_inputs_over_their_bound_together_are_refused(self, embedder: Embedder) -> None:
        with pytest.raises(BadRequest) as caught:
            await embedder.embed(request(*["one two three"] * 4), max_input_tokens=19)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
        await embedder.embed(request(*["one two three"] * 4), max_input_tokens=20)

    async def test_signs_of_the_tokenizer_in_a_text_are_text(self, embedder: Embedder) -> None:
        made = await embedder.embed(request("[SEP]"), max_input_tokens=60_000)
        assert made.usage.prompt == 5  # [ sep ] and two around them

    async def test_many_at_once_get_what_each_gets_alone(self, embedder: Embedder) -> None:
        texts = [f"text number {number}" * (number % 3 + 1) for number in range(6)]
        alone = [(await vectors(embedder, text))[0] for text in texts]
        together = await asyncio.gather(*(vectors(embedder, text) for text in texts))
        for one, (other,) in zip(alone, together, strict=True):
            assert cosine(one, other) > 0.9999

    async def test_a_closed_engine_refuses(self, embedder: Embedder) -> None:
        assert await embedder.healthy()
        await embedder.close()
        with pytest.raises((CocoonError, RuntimeError)):
            await vectors(embedder, "x")
