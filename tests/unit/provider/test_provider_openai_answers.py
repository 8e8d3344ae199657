"""An OpenAI-compatible server's replies are read strictly, and what is read can be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cocoon.chat import TokenUsage
from cocoon.kernel.errors import Unavailable
from services.provider.backends.base import Ended, Piece
from services.provider.backends.openai_answers import (
    LEAST_LOGPROB,
    MAX_LINE_BYTES,
    StreamReader,
    named,
    read_item,
    read_whole,
)

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def whole(usage: Any = USAGE, **choice: Any) -> bytes:
    shown = {"message": {"content": "hello"}, "finish_reason": "stop", **choice}
    return json.dumps({"choices": [shown], "usage": usage}).encode()


def logprobs(**entry: Any) -> dict[str, Any]:
    return {"logprobs": {"content": [{"token": "h", "logprob": -0.5, **entry}]}}


def test_a_whole_answer_is_its_text_and_its_end() -> None:
    details = {
        "prompt_tokens_details": {"cached_tokens": 9},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    piece, end = read_whole(whole(USAGE | details))
    assert piece == Piece("hello", 3)
    assert end == Ended("stop", TokenUsage(prompt=7, completion=3, cached=7, reasoning=1))
    assert read_whole(whole(message=None, finish_reason="length"))[0] is None


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b'{"choices":[1],"usage":{}}', b"[" * 100_000,
        whole(message={"content": 5}), whole(message=[1]), whole(finish_reason="wizard"),
        whole(finish_reason=[]), whole(None), whole([1]), whole({}),
        whole({**USAGE, "prompt_tokens": -1}), whole({**USAGE, "prompt_tokens": 2**31}),
        whole({**USAGE, "prompt_tokens": 1.5}), whole({**USAGE, "prompt_tokens": True}),
        whole({**USAGE, "prompt_tokens": float("inf")}),
        whole({**USAGE, "prompt_tokens_details": [1]}),
        whole(**logprobs(logprob=None)), whole(**logprobs(logprob=float("nan"))),
        whole(**logprobs(logprob=float("inf"))), whole(**logprobs(logprob=10**400)),
        whole(**logprobs(bytes=5)), whole(**logprobs(bytes=[256])), whole(**logprobs(token=5)),
        whole(**logprobs(top_logprobs=[1])), whole(logprobs=[1]),
    ],
    ids=lambda raw: raw[:90].decode(),
)  # fmt: skip
def test_what_is_not_an_answer_is_the_engines_failure(raw: bytes) -> None:
    with pytest.raises(Unavailable) as failed:
        read_whole(raw)
    assert failed.value.code == "engine_failed"


def test_a_number_for_bytes_takes_no_memory() -> None:
    with pytest.raises(Unavailable):
        read_whole(whole(**logprobs(bytes=10**12)))


def test_halves_of_characters_are_joined_or_replaced() -> None:
    (piece,) = StreamReader().take({"choices": [{"delta": {"content": "\ud83d\ude00 \ud800"}}]})
    assert piece.text == "😀 �"


def test_minus_infinity_is_the_least_log_probability() -> None:
    rivals = [{"token": "b", "logprob": float("-inf")}]
    piece, _ = read_whole(whole(**logprobs(top_logprobs=rivals)))
    assert piece is not None
    assert piece.logprobs[0].top[0].logprob == LEAST_LOGPROB


def test_a_stream_ends_with_the_reason_and_counts_that_it_told() -> None:
    reader = StreamReader()
    assert reader.take({"choices": [{"delta": {"content": "a"}}]}) == [Piece("a", 1)]
    assert reader.take({"choices": [{"delta": {}, "finish_reason": "length"}]}) == []
    with pytest.raises(Unavailable, match="without a reason"):
        reader.end()
    assert reader.take({"choices": [], "usage": USAGE}) == []
    assert reader.end() == Ended("length", TokenUsage(prompt=7, completion=3))


@pytest.mark.parametrize(
    "item",
    [{"error": 1}, {"choices": 1}, {"choices": [1]}, {"choices": [{"delta": 5}]},
     {"choices": [{"delta": {"content": ["x"]}}]}],
    ids=json.dumps,
)  # fmt: skip
def test_a_stream_item_of_another_form_is_the_engines_failure(item: dict[str, Any]) -> None:
    with pytest.raises(Unavailable):
        StreamReader().take(item)


def event(item: Any) -> bytes:
    return b"data: " + json.dumps(item).encode() + b"\n\n"


WORDS = [event({"choices": [{"delta": {"content": word}}]}) for word in ("one", " two", " \ud800")]
CLOSING = event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE})


def test_text_that_came_together_is_one_piece_of_all_its_tokens() -> None:
    reader = StreamReader()
    assert reader.feed(WORDS[0] + WORDS[1] + WORDS[2][:20]) == [Piece("one two", 2)]
    assert reader.feed(WORDS[2][20:]) == [Piece(" \ufffd", 1)]
    assert not reader.done
    ended = Ended("stop", TokenUsage(prompt=7, completion=3))
    assert reader.feed(CLOSING + b"data: [DONE]\n\n" + WORDS[0]) == [ended]
    assert reader.done
    assert reader.feed(b"data: [DONE]\n" + WORDS[0]) == []


def test_tokens_that_are_told_one_by_one_stay_apart() -> None:
    items = [{"choices": [{"delta": {"content": "h"}, **logprobs()}]}] * 2
    pieces = StreamReader().feed(b"".join(map(event, items)))
    assert [(piece.text, len(piece.logprobs)) for piece in pieces] == [("h", 1), ("h", 1)]


def test_a_stream_is_read_the_same_wherever_the_network_cuts_it() -> None:
    raw = b": a comment\r\n\r\n" + b"".join(WORDS) + CLOSING + b"data: [DONE]\r\n\r\n"
    for cut in range(len(raw)):
        reader = StreamReader()
        outputs = reader.feed(raw[:cut]) + reader.feed(raw[cut:])
        pieces = [output for output in outputs if isinstance(output, Piece)]
        assert "".join(piece.text for piece in pieces) == "one two \ufffd"
        assert sum(piece.tokens for piece in pieces) == 3
        assert outputs[-1] == Ended("stop", TokenUsage(prompt=7, completion=3))


def test_a_line_without_an_end_is_the_engines_failure() -> None:
    reader = StreamReader()
    reader.feed(b"data: ")
    with pytest.raises(Unavailable, match="too long"):
        reader.feed(b"x" * MAX_LINE_BYTES)


def test_a_line_is_an_object_or_nothing_or_a_failure() -> None:
    assert read_item(b'{"a":1}') == {"a": 1}
    assert read_item(b"[1]") is None
    for bad in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(Unavailable, match="not JSON"):
            read_item(bad)


def test_only_names_of_an_error_are_passed_on() -> None:
    told = {"error": {"message": "canary", "code": "too_long", "param": "not a name"}}
    assert named(json.dumps(told).encode()) == ("too_long", None)
    for bad in (b"", b"[]", b'{"error":1}', b"[" * 100_000):
        assert named(bad) == (None, None)
