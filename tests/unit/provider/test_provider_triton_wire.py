"""A Triton server's replies, errors and metrics are read strictly, and nothing of them is told."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.chat import TokenUsage, parse_chat_request
from cocoon.kernel.errors import BadRequest, ConfigurationError, RateLimited, Unavailable
from services.provider.backends.base import Ended, Piece, Started
from services.provider.backends.triton import check_address
from services.provider.backends.triton_wire import (
    MAX_METRICS_BYTES,
    OUTPUTS,
    read_error,
    read_load,
    read_outputs,
    request_text,
)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<I", len(raw)) + raw


def tensors(**changed: bytes) -> dict[str, bytes]:
    return {
        "text": text(""), "tokens": struct.pack("<i", 0), "logprobs": text(""),
        "finish_reason": text(""), "usage": struct.pack("<4i", 0, 0, 0, 0), **changed,
    }  # fmt: skip


def test_the_first_response_tells_the_prompts_count() -> None:
    told = tensors(usage=struct.pack("<4i", 7, 0, 0, 0))
    assert read_outputs(told, first=True) == [Started(7)]
    assert read_outputs(tensors(), first=True) == [Started(None)]
    assert read_outputs(tensors(), first=False) == []


def test_a_piece_and_the_end_may_come_together() -> None:
    told = tensors(
        text=text("né"), tokens=struct.pack("<i", 2), finish_reason=text("length"),
        usage=struct.pack("<4i", 9, 2, 1, 1),
    )  # fmt: skip
    assert read_outputs(told, first=False) == [
        Piece("né", 2),
        Ended("length", TokenUsage(prompt=9, completion=2, cached=1, reasoning=1)),
    ]


def test_logprobs_are_bytes_numbers_and_their_rivals() -> None:
    shown = [[b"\xc3".hex(), -0.5, [["61", -1.0, []]]]]
    (piece,) = read_outputs(tensors(logprobs=text(json.dumps(shown))), first=False)
    assert isinstance(piece, Piece)
    (item,) = piece.logprobs
    assert (item.raw, item.logprob, item.top[0].raw) == (b"\xc3", -0.5, b"a")


@pytest.mark.parametrize(
    "changed",
    [
        {"text": b"\xff\xff\xff\xff"},
        {"text": b"\x01"},
        {"text": text(b"\xff")},
        {"text": text("a") + b"more"},
        {"tokens": struct.pack("<i", -1)},
        {"tokens": b""},
        {"usage": struct.pack("<3i", 1, 1, 1)},
        {"logprobs": text("{}")},
        {"logprobs": text('[["zz", 0, []]]')},
        {"logprobs": text('[["61", NaN, []]]')},
        {"logprobs": text('[["61", ' + "9" * 400 + ", []]]")},
        {"logprobs": text('[["61", 0, [["61", 0, [["61", 0, []]]]]]]')},
        {"logprobs": text("[" * 100_000)},
        {"finish_reason": text("tool_calls")},
        {"finish_reason": text("stop"), "usage": struct.pack("<4i", 1, 1, 2, 0)},
        {"finish_reason": text("stop"), "usage": struct.pack("<4i", 1, 1, 0, 2)},
    ],
)
def test_a_reply_that_is_none_is_an_error(changed: dict[str, bytes]) -> None:
    with pytest.raises(Unavailable) as caught:
        read_outputs(tensors(**changed), first=False)
    assert caught.value.code == "engine_failed"


def test_a_reply_without_a_tensor_is_an_error() -> None:
    for name in OUTPUTS:
        with pytest.raises(Unavailable):
            read_outputs({n: raw for n, raw in tensors().items() if n != name}, first=True)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {name: st.one_of(st.binary(max_size=40), st.binary(max_size=30).map(text))
         for name in OUTPUTS}
    )
)  # fmt: skip
def test_any_bytes_are_an_answer_or_unavailable(raw: dict[str, bytes]) -> None:
    with contextlib.suppress(Unavailable):  # and nothing else
        assert isinstance(read_outputs(raw, first=True)[0], Started)


@pytest.mark.parametrize(
    ("message", "kind", "code", "param"),
    [
        ("cocoon-error:request:invalid_value:logit_bias", BadRequest, "invalid_value",
         "logit_bias"),
        ("[request id: 1] cocoon-error:request:context_length_exceeded:", BadRequest,
         "context_length_exceeded", None),
        ("cocoon-error:busy:busy:", RateLimited, "busy", None),
        ("cocoon-error:engine:engine_failed:", Unavailable, "engine_failed", None),
        ("the prompt 'canary' is bad", Unavailable, "engine_failed", None),
        ("cocoon-error:request:canary is here:", Unavailable, "engine_failed", None),
        ("cocoon-error:request:" + "a" * 65 + ":", Unavailable, "engine_failed", None),
    ],
)  # fmt: skip
def test_a_servers_error_is_told_in_our_words(
    message: str, kind: type[Any], code: str, param: str | None
) -> None:
    error = read_error(message)
    assert type(error) is kind
    assert (error.code, error.param) == (code, param)
    assert "canary" not in error.message


def test_the_load_is_what_waits_and_what_runs() -> None:
    metrics = b"""# HELP nv_inference_pending_request_count Instantaneous number
nv_inference_pending_request_count{model="skills-1",version="1"} 3
nv_inference_pending_request_count{model="other",version="1"} 50
cocoon_engine_running{model="skills-1"} 2
cocoon_engine_running_total{model="skills-1"} 70
nv_inference_count{model="skills-1",version="1"} 90
"""
    assert read_load(metrics, "skills-1") == 5
    assert read_load(metrics, "other") == 50
    assert read_load(metrics, "skills") is None


@pytest.mark.parametrize(
    "line",
    [b"-1", b"NaN", b"1e9", b"1 2 3", b"9" * 16, b"+Inf", b"", b"0x1", "٣".encode()],
)
def test_a_sample_that_is_no_number_is_no_load(line: bytes) -> None:
    assert read_load(b'cocoon_engine_running{model="m"} ' + line + b"\n", "m") is None


def test_what_lies_behind_the_bound_is_not_looked_at() -> None:
    sample = b'cocoon_engine_running{model="m"} 1\n'
    assert read_load(b"#" * MAX_METRICS_BYTES + b"\n" + sample, "m") is None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.text(max_size=10))
def test_any_metrics_are_a_load_or_none(raw: bytes, model: str) -> None:
    load = read_load(b"cocoon_engine_running{" + raw, model)
    assert load is None or load >= 0


@pytest.mark.parametrize(
    ("url", "target", "tls"),
    [
        ("grpc://127.0.0.1:8001", "127.0.0.1:8001", False),
        ("grpc://localhost:8001/", "localhost:8001", False),
        ("grpc://[::1]:8001", "[::1]:8001", False),
        ("grpcs://triton.example:8001", "triton.example:8001", True),
        ("grpcs://127.0.0.1:8001", "127.0.0.1:8001", True),
    ],
)
def test_loopback_and_tls_addresses_are_taken(url: str, target: str, tls: bool) -> None:
    assert check_address(url) == (target, tls)


@pytest.mark.parametrize(
    "url",
    [
        "grpc://10.0.0.1:8001", "grpc://triton.example:8001", "grpc://127.0.0.1", "grpcs://host",
        "grpc://127.0.0.1.example:80", "grpc://a:b@127.0.0.1:8001", "grpcs://u@host:1",
        "grpc://127.0.0.1:99999", "grpc://127.0.0.1:8001/path", "grpc://127.0.0.1:8001?a=b",
        "http://127.0.0.1:8001", "127.0.0.1:8001", "grpc://[::1", "unix:///tmp/x", "",
    ],
)  # fmt: skip
def test_every_other_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        check_address(url)


def test_what_the_engine_need_not_know_is_not_sent() -> None:
    asked = parse_chat_request(
        {
            "model": "m", "messages": [{"role": "user", "content": "hi"}], "user": "me",
            "metadata": {"a": "b"}, "safety_identifier": "s", "stream": True, "temperature": 0,
        }
    )  # fmt: skip
    sent = json.loads(request_text(asked))
    assert sent == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.0,
    }  # fmt: skip
    assert parse_chat_request(request_text(asked)).messages == asked.messages
