"""The chat contract's door: every parameter is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params as params

from cocoon.chat import (
    EVERYTHING,
    PARAMETERS,
    Capabilities,
    ChatRequest,
    Support,
    parse_chat_request,
)
from cocoon.kernel.errors import BadRequest

BASE: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "canary"}]}


def parse(**changes: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({**BASE, **changes}).encode())


SCHEMA: dict[str, Any] = {"type": "json_schema"}


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


def refusal(**changes: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse(**changes)
    assert "canary" not in str(caught.value)
    return caught.value


def test_the_table_names_exactly_the_parameters_of_the_installed_openai_package() -> None:
    known = set(get_type_hints(params.CompletionCreateParamsNonStreaming))
    known |= set(get_type_hints(params.CompletionCreateParamsStreaming))
    assert set(PARAMETERS) == known


def test_every_honoured_parameter_has_a_field_and_no_refused_one_has() -> None:
    honoured = {name for name, row in PARAMETERS.items() if row.support is Support.HONOURED}
    assert honoured == set(ChatRequest.model_fields) - {"service_tier"}


@pytest.mark.parametrize(
    "name", [name for name, row in PARAMETERS.items() if row.support is Support.REFUSED]
)
def test_a_refused_parameter_is_refused_by_name(name: str) -> None:
    error = refusal(**{name: "canary"})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert name in error.message
    assert parse(**{name: None}).model == "skills-1"


@pytest.mark.parametrize(
    "name", [name for name, row in PARAMETERS.items() if row.support is Support.LIMITED]
)
def test_a_limited_parameter_takes_its_listed_values_only(name: str) -> None:
    for value in PARAMETERS[name].values:
        parse(**{name: value})
    for value in ("canary", 2, True, {"x": 1}, ["text", "audio"]):
        error = refusal(**{name: value})
        assert (error.param, error.code) == (name, "unsupported_value")


def test_an_unknown_parameter_is_refused_by_name() -> None:
    error = refusal(frobnicate=1)
    assert (error.param, error.code) == ("frobnicate", "unknown_parameter")
    assert error.to_openai()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"temperature": "canary"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation", "unsupported_value",
        ),
        (
            {"stream": True, "stream_options": {"frob": True}},
            "stream_options.frob", "unknown_parameter",
        ),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "canary"}, "messages", "invalid_type"),
        ({"messages": [{"role": "wizard", "content": "canary"}]}, "messages[0].role",
         "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "canary", "tool_call_id": "x"}]},
         "messages.role", "unsupported_value"),
        ({"messages": [{"role": "user", "content": "canary", "name": "bob"}]},
         "messages.name", "unsupported_parameter"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
         "messages.tool_calls", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.content", "unsupported_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"response_format": SCHEMA | {"json_schema": {"\ud800": 1}}},
         "response_format.json_schema", "invalid_value"),
        ({"response_format": SCHEMA | {"json_schema": {"a": deep(64)}}},
         "response_format.json_schema", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
        ({"user": "u" * 513}, "user", "invalid_value"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_place_and_without_its_text(
    changes: dict[str, Any], param: str, code: str
) -> None:
    error = refusal(**changes)
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a":NaN}', b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat_request(body)
    assert caught.value.code == "invalid_json"


def test_text_parts_are_joined_and_a_repeated_answer_is_taken() -> None:
    request = parse(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": part} for part in "ab"]},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": [],
             "audio": None, "function_call": None, "tool_calls": None},
        ]
    )  # fmt: skip
    assert [message.content for message in request.messages] == ["be brief", "ab", "c"]


def test_what_an_engine_cannot_do_is_refused_by_name() -> None:
    plain = Capabilities()
    for name, value in {
        "logprobs": True, "logit_bias": {"5": 1}, "presence_penalty": 0.5,
        "frequency_penalty": -1, "seed": 7, "response_format": {"type": "json_object"},
    }.items():  # fmt: skip
        body = {**BASE, name: value}
        parse_chat_request(body, capabilities=EVERYTHING)
        with pytest.raises(BadRequest) as caught:
            parse_chat_request(body, capabilities=plain)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_a_request_never_prints() -> None:
    request = parse(user="canary", stop="canary", metadata={"canary": "canary"})
    assert "canary" not in repr(request) + str(request) + repr(request.messages)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(PARAMETERS)), _JSON, max_size=4))
def test_any_json_is_parsed_or_refused_but_never_an_accident(body: dict[str, Any]) -> None:
    try:
        parse_chat_request(json.dumps({**BASE, **body}).encode())
    except BadRequest as error:
        assert error.http_status == 400 and error.param  # noqa: PT017, PT018
