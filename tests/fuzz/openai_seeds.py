"""Seeds of the parsers of completions and embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

Seeds = Iterator[tuple[str, bytes]]
USAGE: Final = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def openai_completion() -> Seeds:
    choice = {"text": "hi", "index": 0, "finish_reason": "stop", "logprobs": None}
    told: dict[str, Any] = {"tokens": ["h", "i"], "token_logprobs": [-0.5, -1]}
    told |= {"top_logprobs": [{"h": -0.5, "x": -2}, None], "text_offset": [0, 1]}
    yield "answer", _json({"choices": [choice], "usage": USAGE})
    uneven, null = told | {"token_logprobs": [-0.5]}, told | {"token_logprobs": [None, 0]}
    for name, logprobs in (("logprobs", told), ("uneven", uneven), ("null", null)):
        yield name, _json({"choices": [choice | {"logprobs": logprobs}], "usage": USAGE})


def openai_embeddings() -> Seeds:
    item = {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
    usage = {"prompt_tokens": 4, "total_tokens": 4}
    yield "numbers", _json({"data": [item, item | {"index": 1}], "usage": usage})
    text = {"embedding": "AAAAPwAAgL4="}
    yield "base64", _json({"data": [item | text, item | text | {"index": 1}], "usage": usage})
    yield "twice", _json({"data": [item, item], "usage": usage})
    short = {"index": 1, "embedding": [1]}
    yield "lengths", _json({"data": [item, item | short], "usage": usage})
    wide = {"embedding": [1e300, 0]}
    yield "too-wide", _json({"data": [item | wide, item | {"index": 1}], "usage": usage})


def completion_request() -> Seeds:
    plain: dict[str, Any] = {"model": "skills-1", "prompt": "hi"}
    yield "plain", _json(plain)
    yield "full", _json(plain | {
        "prompt": ["hi"], "temperature": 0.5, "top_p": 1, "seed": -1, "stop": ["a", "b"],
        "logit_bias": {"5": -100}, "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": 5, "logprobs": 5, "user": "u", "n": 1, "best_of": 1, "echo": False,
    })  # fmt: skip
    yield "ids", _json(plain | {"prompt": [1, 2]})
    yield "suffix", _json(plain | {"suffix": "x"})
    yield "surrogate", b'{"model":"m","prompt":"\\ud800"}'


def embedding_request() -> Seeds:
    plain: dict[str, Any] = {"model": "m", "input": "hi"}
    yield "plain", _json(plain)
    full = {"input": ["a", "né"], "dimensions": 384, "encoding_format": "base64", "user": "u"}
    yield "full", _json(plain | full)
    yield "ids", _json(plain | {"input": [[1, 2], [3]]})
    yield "empty", _json(plain | {"input": ["a", ""]})
    yield "surrogate", b'{"model":"m","input":"\\ud800"}'
