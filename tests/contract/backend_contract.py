"""What every engine must do for the agent: one suite, subclassed once per backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cocoon.chat import (
    ChatRequest,
    CompletionRequest,
    TextRequest,
    parse_chat_request,
    parse_completion_request,
)
from cocoon.kernel.errors import BadRequest, CocoonError, Rejected
from services.provider.backends.base import Backend, Ended, Output, Piece, Started

MODEL = "skills-1"


def request(text: str = "Count from 1 to 9", **parameters: Any) -> ChatRequest:
    return parse_chat_request(
        {
            "model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True,
            **parameters,
        }
    )  # fmt: skip


def completion(prompt: str = "hello there", **parameters: Any) -> CompletionRequest:
    return parse_completion_request(
        {"model": MODEL, "prompt": prompt, "stream": True, **parameters}
    )


async def collect(
    backend: Backend, asked: TextRequest, *, max_input: int = 400, max_output: int = 40
) -> tuple[str, list[Output]]:
    """The joined text and every output."""
    outputs = [
        output
        async for output in backend.generate(
            asked, max_input_tokens=max_input, max_output_tokens=max_output
        )
    ]
    return "".join(output.text for output in outputs if isinstance(output, Piece)), outputs


class BackendContract:
    """A subclass gives `backend` (started) and says whether outputs repeat exactly."""

    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        raise NotImplementedError
        yield  # noqa: PT022 - the subclasses' fixtures close what they give

    async def test_an_answer_is_started_pieces_ended(self, backend: Backend) -> None:
        text, outputs = await collect(backend, request(temperature=0))
        assert isinstance(outputs[0], Started)
        assert isinstance(outputs[-1], Ended)
        assert {type(output) for output in outputs[1:-1]} <= {Piece}
        usage = outputs[-1].usage
        assert usage.prompt > 0
        assert 0 < usage.completion <= 40
        assert outputs[0].prompt_tokens in (None, usage.prompt)
        assert text

    async def test_greedy_answers_repeat(self, backend: Backend) -> None:
        first, _ = await collect(backend, request(temperature=0))
        second, _ = await collect(backend, request(temperature=0))
        assert first == second

    async def test_many_at_once_get_what_each_gets_alone(self, backend: Backend) -> None:
        texts = [f"Count from 1 to {n}" for n in (3, 7, 12, 7)]
        alone = [(await collect(backend, request(text, temperature=0)))[0] for text in texts]
        together = await asyncio.gather(
            *(collect(backend, request(text, temperature=0)) for text in texts)
        )
        assert [text for text, _ in together] == alone

    async def test_the_output_bound_holds(self, backend: Backend) -> None:
        _, outputs = await collect(backend, request(temperature=0), max_output=3)
        ended = outputs[-1]
        assert isinstance(ended, Ended)
        assert ended.usage.completion <= 3
        assert ended.reason == "length"

    async def test_a_stop_text_ends_the_answer_before_it(self, backend: Backend) -> None:
        whole, _ = await collect(backend, request(temperature=0))
        stop = whole[2:4]
        text, outputs = await collect(backend, request(temperature=0, stop=[stop, "\x07never"]))
        assert text == whole[: whole.index(stop)]
        assert isinstance(outputs[-1], Ended)
        assert outputs[-1].reason == "stop"

    async def test_a_seed_repeats_a_hot_answer(self, backend: Backend) -> None:
        if not backend.capabilities.seed:
            pytest.skip("this backend promises no seed")
        hot: dict[str, Any] = {"temperature": 2}
        if backend.capabilities.logit_bias:  # a sure model is made to choose among letters
            hot["logit_bias"] = {str(token): 100 for token in range(97, 107)}
        rounds = [
            [(await collect(backend, request(**hot, seed=seed)))[0] for seed in range(4)]
            for _ in range(2)
        ]
        assert rounds[0] == rounds[1]
        assert len(set(rounds[0])) > 1

    async def test_a_prompt_over_its_bound_is_refused(self, backend: Backend) -> None:
        with pytest.raises(BadRequest) as caught:
            await collect(backend, request("word " * 40), max_input=10)
        assert caught.value.code == "context_length_exceeded"
        assert "word" not in caught.value.message
        for told in (
            f"at most 10 fit: the model's context is {backend.context_tokens} and",
            "of it are kept for the answer",
            "max_tokens or max_completion_tokens",
        ):  # fmt: skip
            assert told in caught.value.message

    async def test_a_prompt_over_the_context_is_refused(self, backend: Backend) -> None:
        text = "canary " * backend.context_tokens
        with pytest.raises(Rejected) as caught:
            await collect(backend, request(text), max_input=2**31)
        assert "canary" not in caught.value.message

    async def test_closing_the_generator_cancels_and_frees(self, backend: Backend) -> None:
        for _ in range(40):  # more often than any queue is long
            outputs = backend.generate(request(), max_input_tokens=400, max_output_tokens=200)
            async for output in outputs:
                if isinstance(output, Piece):
                    break
            await outputs.aclose()
        text, _ = await collect(backend, request(temperature=0))
        assert text

    async def test_logprobs_belong_to_the_text(self, backend: Backend) -> None:
        if not backend.capabilities.logprobs:
            pytest.skip("this backend tells no log probabilities")
        text, outputs = await collect(
            backend, request(temperature=0, logprobs=True, top_logprobs=2)
        )
        told = [item for output in outputs if isinstance(output, Piece) for item in output.logprobs]
        assert b"".join(item.raw for item in told).decode() == text
        assert all(item.logprob <= 0 and len(item.top) == 2 for item in told)
        assert all(item.top[0].logprob >= item.top[1].logprob for item in told)

    # ---- completions: a bare text that is continued ----

    async def test_a_completion_is_started_pieces_ended(self, backend: Backend) -> None:
        text, outputs = await collect(backend, completion(temperature=0), max_output=5)
        assert isinstance(outputs[0], Started)
        ended = outputs[-1]
        assert isinstance(ended, Ended)
        assert ended.usage.prompt > 0
        assert ended.usage.completion <= 5
        assert text
        assert (await collect(backend, completion(temperature=0), max_output=5))[0] == text
        whole, _ = await collect(backend, completion(temperature=0, stream=False), max_output=5)
        assert whole == text

    async def test_a_completion_has_no_template_around_it(self, backend: Backend) -> None:
        _, bare = await collect(backend, completion("hello there"), max_output=1)
        _, spoken = await collect(backend, request("hello there"), max_output=1)
        assert bare[-1].usage.prompt < spoken[-1].usage.prompt  # type: ignore[union-attr]

    async def test_a_stop_text_ends_a_completion_before_it(self, backend: Backend) -> None:
        whole, _ = await collect(backend, completion(temperature=0), max_output=8)
        stop = whole[2:4]
        asked = completion(temperature=0, stop=[stop, "\x07never"])
        text, outputs = await collect(backend, asked, max_output=8)
        assert text == whole[: whole.index(stop)]
        assert outputs[-1].reason == "stop"  # type: ignore[union-attr]

    async def test_log_probabilities_of_a_completion_belong_to_its_text(
        self, backend: Backend
    ) -> None:
        if not backend.capabilities.logprobs:
            pytest.skip("this backend tells no log probabilities")
        text, outputs = await collect(backend, completion(temperature=0, logprobs=2), max_output=6)
        told = [item for output in outputs if isinstance(output, Piece) for item in output.logprobs]
        assert "".join(item.token for item in told) == text
        assert all(item.logprob <= 0 and len(item.top) == 2 for item in told)
        assert all(item.top[0].logprob >= item.top[1].logprob for item in told)

    async def test_a_completions_prompt_over_its_bound_is_refused(self, backend: Backend) -> None:
        with pytest.raises(BadRequest) as caught:
            await collect(backend, completion("word " * 40), max_input=10)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        assert "word" not in caught.value.message
        assert "Shorten the prompt" in caught.value.message

    async def test_a_closed_engine_refuses(self, backend: Backend) -> None:
        assert await backend.healthy()
        await backend.close()
        with pytest.raises((CocoonError, RuntimeError)):
            await collect(backend, request())
