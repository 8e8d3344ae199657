"""OpenAI's completions: every parameter honoured or refused by name, answers in OpenAI's form."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from cocoon.chat import (
    COMPLETION_PARAMETERS,
    Capabilities,
    CompletionAnswer,
    CompletionRequest,
    Support,
    TokenLogprob,
    TokenUsage,
    parse_completion_request,
)
from cocoon.kernel.errors import BadRequest


def parse(**changes: Any) -> CompletionRequest:
    return parse_completion_request({"model": "skills-1", "prompt": "1 2 3", **changes})


def test_the_table_is_the_openai_packages_own() -> None:
    official = get_type_hints(CompletionCreateParamsNonStreaming) | get_type_hints(
        CompletionCreateParamsStreaming
    )
    assert set(COMPLETION_PARAMETERS) == set(official)


def test_what_the_table_honours_is_what_the_form_has() -> None:
    honoured = {
        name for name, row in COMPLETION_PARAMETERS.items() if row.support is Support.HONOURED
    }
    assert honoured == set(CompletionRequest.model_fields)


def test_a_list_of_one_prompt_is_a_prompt() -> None:
    assert parse(prompt=["1 2 3"]).prompt == "1 2 3"


def test_the_bound_that_nobody_named_is_openais() -> None:
    assert parse().max_output_tokens == 16
    assert parse(max_tokens=7).max_output_tokens == 7


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "unsupported_value"),
        ({"prompt": []}, "prompt", "unsupported_value"),
        ({"prompt": [1, 2]}, "prompt", "unsupported_value"),
        ({"prompt": [[1], [2]]}, "prompt", "unsupported_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": {}}, "prompt", "invalid_type"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"echo": True}, "echo", "unsupported_value"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    changes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**changes)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    "changes",
    [{"n": 1}, {"best_of": 1}, {"echo": False}, {"suffix": None}, {"n": None}, {"logprobs": 0}],
)
def test_what_asks_for_nothing_is_taken(changes: dict[str, Any]) -> None:
    assert parse(**changes).prompt == "1 2 3"


@pytest.mark.parametrize(
    "asked",
    [{"logprobs": 0}, {"logit_bias": {"1": 1}}, {"frequency_penalty": 1}, {"seed": 1}],
)
def test_what_the_engine_cannot_is_refused_by_name(asked: dict[str, Any]) -> None:
    body = {"model": "m", "prompt": "x", **asked}
    with pytest.raises(BadRequest) as caught:
        parse_completion_request(body, capabilities=Capabilities())
    assert caught.value.param == next(iter(asked))
    parse_completion_request(body)


def test_nothing_of_a_prompt_prints() -> None:
    assert "1 2 3" not in repr(parse())


_TOKENS = st.lists(
    st.builds(
        lambda text, logprob: TokenLogprob(
            text, text.encode(), logprob, (TokenLogprob(text, text.encode(), logprob),)
        ),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=4),
        st.floats(-100, 0),
    ),
    max_size=6,
)


@given(tokens=_TOKENS, cut=st.integers(0, 6), logprobs=st.booleans())
def test_a_streams_chunks_and_the_whole_body_say_the_same(
    tokens: list[TokenLogprob], cut: int, logprobs: bool
) -> None:
    asked = parse(stream=True, **({"logprobs": 1} if logprobs else {}))
    told = tokens if logprobs else []
    text = "".join(token.token for token in tokens)
    parts = (tokens[:cut], tokens[cut:])
    streaming = CompletionAnswer("ab" * 16, 1, "fp", asked)
    chunks = [
        streaming.delta_chunk("".join(token.token for token in part), part if logprobs else [])
        for part in parts
    ]
    whole = CompletionAnswer("ab" * 16, 1, "fp", parse(**({"logprobs": 1} if logprobs else {})))
    body = whole.completion(text, "stop", TokenUsage(3, len(tokens)), told)
    Completion.model_validate(body)
    Completion.model_validate(streaming.final_chunk("stop"))
    choice = body["choices"][0]
    assert choice["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    if not logprobs:
        assert choice["logprobs"] is None
        return
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert choice["logprobs"][name] == [
            item for chunk in chunks for item in chunk["choices"][0]["logprobs"][name]
        ]
    for at, token in zip(choice["logprobs"]["text_offset"], tokens, strict=True):
        assert text[at:].startswith(token.token)


def test_usage_comes_last_where_it_was_asked_for() -> None:
    answer = CompletionAnswer(
        "ab" * 16, 1, "fp", parse(stream=True, stream_options={"include_usage": True})
    )
    assert answer.delta_chunk("x")["usage"] is None
    last = answer.usage_chunk(TokenUsage(3, 4))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)
    assert answer.opening() is None
