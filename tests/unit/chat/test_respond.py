"""Answers are what the openai package's own models take, in OpenAI's order."""

from __future__ import annotations

import json
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cocoon.chat import Answer, TokenLogprob, TokenUsage, error_body, parse_chat_request, to_json
from cocoon.kernel.errors import BadRequest

USAGE = TokenUsage(prompt=5, completion=2, cached=1, reasoning=0)


def answer(**changes: Any) -> Answer:
    body = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}], **changes}
    return Answer("ab" * 16, 1_790_000_000, "fp_0123456789", parse_chat_request(body))


def test_a_whole_answer_is_a_chat_completion() -> None:
    token = TokenLogprob("hé", "hé".encode(), -0.25, (TokenLogprob("x", b"x", -2.0),))
    built = answer(logprobs=True, top_logprobs=1, metadata={"a": "b"}).completion(
        "hé", "stop", USAGE, [token]
    )
    parsed = ChatCompletion.model_validate_json(to_json(built), strict=True)
    assert parsed.to_dict() == {**built}
    assert parsed.choices[0].message.content == "hé"
    assert parsed.usage == CompletionUsage.model_validate(USAGE.to_openai())
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.content is not None
    assert bytes(parsed.choices[0].logprobs.content[0].bytes or []) == "hé".encode()


def test_a_stream_is_role_deltas_end_and_usage_with_null_usage_before() -> None:
    told = answer(stream=True, stream_options={"include_usage": True})
    chunks = [
        told.role_chunk(), told.delta_chunk("h"), told.delta_chunk("i"),
        told.final_chunk("length"), told.usage_chunk(USAGE),
    ]  # fmt: skip
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(to_json(chunk), strict=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["usage"] for chunk in chunks[:4]] == [None] * 4
    assert chunks[3]["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
    assert chunks[4]["choices"] == []
    assert chunks[4]["usage"]["total_tokens"] == 7
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_speaks_of_usage() -> None:
    told = answer(stream=True)
    assert "usage" not in told.role_chunk() | told.delta_chunk("x") | told.final_chunk("stop")


def test_service_tier_is_told_only_when_it_was_asked_for() -> None:
    assert "service_tier" not in answer().role_chunk()
    assert answer(service_tier="auto").role_chunk()["service_tier"] == "default"


def test_an_error_is_openais_object() -> None:
    body = json.loads(error_body(BadRequest("Say more.", param="messages", code="invalid_value")))
    assert body == {
        "error": {
            "message": "Say more.", "type": "invalid_request_error",
            "param": "messages", "code": "invalid_value",
        }
    }  # fmt: skip
