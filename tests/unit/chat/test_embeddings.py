"""OpenAI's embeddings: inputs taken or refused by name, vectors exact in both of their forms."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse
from openai.types.embedding_create_params import EmbeddingCreateParams

from cocoon.chat import (
    EMBEDDING_PARAMETERS,
    Embedded,
    EmbeddingRequest,
    TokenUsage,
    answer_json,
    check_kind,
    parse_embedding_request,
)
from cocoon.chat.embeddings import (
    check_dimensions,
    embedding_answer,
    embedding_bytes,
    floats,
    pack,
    unpack_base64,
)
from cocoon.kernel.errors import BadRequest

_FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40)


def parse(**changes: Any) -> EmbeddingRequest:
    return parse_embedding_request({"model": "m", "input": "x", **changes})


def test_the_table_is_the_openai_packages_own() -> None:
    assert set(EMBEDDING_PARAMETERS) == set(get_type_hints(EmbeddingCreateParams))
    assert set(EmbeddingRequest.model_fields) == set(EMBEDDING_PARAMETERS)


def test_one_text_and_a_list_of_texts_are_inputs() -> None:
    assert parse(input="a").texts == ("a",)
    assert parse(input=["a", "b"]).texts == ("a", "b")
    assert len(parse(input=["a"] * 2048).texts) == 2048


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"input": [1, 2]}, "input", "unsupported_value"),
        ({"input": [[1, 2], [3]]}, "input", "unsupported_value"),
        ({"input": ["a", 1]}, "input", "unsupported_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input[0]", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": ["\ud800"]}, "input[0]", "invalid_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"stream": False}, "stream", "unknown_parameter"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    changes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**changes)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_another_number_of_dimensions_than_the_model_s_is_refused() -> None:
    for asked in (None, 384):
        check_dimensions(parse(dimensions=asked), 384)
    for asked in (383, 385):
        with pytest.raises(BadRequest) as caught:
            check_dimensions(parse(dimensions=asked), 384)
        assert caught.value.param == "dimensions"


@given(numbers=_FLOATS)
def test_numbers_come_back_bit_for_bit_in_both_forms(numbers: list[float]) -> None:
    vector = pack(numbers)
    assert floats(vector) == numbers
    made = Embedded((vector,), TokenUsage(3, 0))
    as_text = json.loads(answer_json(embedding_answer(parse(encoding_format="base64"), made)))
    assert unpack_base64(as_text["data"][0]["embedding"]) == vector
    as_numbers = json.loads(answer_json(embedding_answer(parse(encoding_format="float"), made)))
    told = as_numbers["data"][0]["embedding"]
    assert struct.pack(f"<{len(told)}f", *told) == vector
    CreateEmbeddingResponse.model_validate(as_numbers)
    assert as_numbers["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@given(
    numbers=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20
    ),
    count=st.integers(1, 5),
    form=st.sampled_from(["float", "base64"]),
)
def test_a_body_is_never_longer_than_was_reckoned(
    numbers: list[float], count: int, form: str
) -> None:
    asked = parse(input=["x"] * count, encoding_format=form)
    made = Embedded((pack(numbers),) * count, TokenUsage(2**40, 0))
    assert len(answer_json(embedding_answer(asked, made))) <= embedding_bytes(asked, len(numbers))


@pytest.mark.parametrize("form", ["float", "base64"])
def test_a_body_of_the_longest_numbers_is_not_longer_either(form: str) -> None:
    asked = parse(encoding_format=form)
    made = Embedded((pack([-1.1754943508222875e-38] * 4096),), TokenUsage(1, 0))
    told = answer_json(embedding_answer(asked, made))
    assert len(told) <= embedding_bytes(asked, 4096) < 1.2 * len(told)


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [1e300], ["x"]])
def test_what_is_no_finite_number_makes_no_vector(bad: list[Any]) -> None:
    with pytest.raises(ValueError, match="vector"):
        pack(bad)


@pytest.mark.parametrize(
    "bad", ["?", "AA==", base64.b64encode(struct.pack("<f", float("nan"))).decode()]
)
def test_base64_of_no_vector_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="vector"):
        unpack_base64(bad)


@pytest.mark.parametrize(
    ("endpoint", "kind", "right"),
    [
        ("/v1/embeddings", "chat", "/v1/chat/completions or /v1/completions"),
        ("/v1/chat/completions", "embeddings", "/v1/embeddings"),
        ("/v1/completions", "embeddings", "/v1/embeddings"),
    ],
)
def test_another_endpoint_than_the_models_names_the_right_one(
    endpoint: str, kind: Any, right: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        check_kind(endpoint, kind, "m")
    assert caught.value.code == "wrong_endpoint"
    assert f"is for {right};" in caught.value.message
