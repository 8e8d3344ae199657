"""What an OpenAI-compatible server's JSON says, read with suspicion: pieces, ends, token counts.

Pure. Nothing of a server's text reaches an error: it may quote the prompt. What is read here can
be written: texts have a UTF-8 form, log probabilities are finite, counts are whole numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import msgspec

from cocoon.chat import Embedded, TokenLogprob, TokenUsage
from cocoon.chat.embeddings import pack, unpack_base64
from cocoon.kernel.errors import Unavailable
from services.provider.backends.base import Ended, Output, Piece

MAX_LINE_BYTES: Final = 1024 * 1024
MAX_COUNT: Final = 2**31 - 1
LEAST_LOGPROB: Final = -9999.0  # OpenAI's way to say minus infinity
Json = dict[str, Any]
_Reads = Callable[[Json, int], Piece | None]


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Whatever is wrong with a reply is one error of ours."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise failed("The engine's server sent what is not an answer.") from None


def _json(value: bytes) -> Any:
    """Raises ValueError or RecursionError."""
    try:
        return msgspec.json.decode(value)
    except ValueError:
        return json.loads(value)  # which also takes -Infinity, and halves of pairs of UTF-16


def read_item(value: bytes) -> Json | None:
    """One item of a stream, None if it is no object. Raises Unavailable."""
    try:
        item = _json(value)
    except (ValueError, RecursionError):
        raise failed("The engine's server sent what is not JSON.") from None
    return item if isinstance(item, dict) else None


class StreamReader:
    """Folds a stream's bytes into pieces, and the end that they tell.

    `completions`: the chunks are of a completion, else of a chat.
    """

    def __init__(self, *, completions: bool = False) -> None:
        self._read: _Reads = _completion_piece if completions else partial(_piece, "delta")
        self._reason: Any = None
        self._usage: Any = None
        self._pending = b""
        self.done = False  # [DONE] was read; what follows says nothing

    @property
    def counted(self) -> bool:
        """Whether token counts were told."""
        return bool(self._usage)

    def feed(self, data: bytes) -> list[Output]:
        """What has arrived: text that came together as one piece, the end at [DONE].

        Raises Unavailable.
        """
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > MAX_LINE_BYTES:
            raise failed("The engine's server sent a line that is too long.")
        pieces: list[Piece] = []
        with _reading():
            for line in lines:
                name, _, value = line.strip().partition(b":")
                if self.done or name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    self.done = True
                    return [*_joined(pieces), self.end()]
                item = read_item(value)
                if item is not None:
                    self._take(item, pieces)
        return _joined(pieces)

    def take(self, item: Json) -> list[Piece]:
        """What one item says. Raises Unavailable, also for an error of the server's."""
        pieces: list[Piece] = []
        with _reading():
            self._take(item, pieces)
        return pieces

    def _take(self, item: Json, pieces: list[Piece]) -> None:
        if "error" in item:
            raise failed("The engine's server failed.")
        self._usage = item.get("usage") or self._usage
        for choice in item.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            piece = self._read(choice, 1)
            if piece is not None:
                pieces.append(piece)

    def end(self) -> Ended:
        """The end of the answer. Raises Unavailable without a reason or counts."""
        return _ended(self._reason, self._usage)


def _joined(pieces: list[Piece]) -> list[Output]:
    """Text that arrived together is sealed together: one piece, where no token is told apart."""
    if len(pieces) < 2 or any(piece.logprobs for piece in pieces):
        return list(pieces)
    text = "".join([piece.text for piece in pieces])
    return [Piece(text, sum(piece.tokens for piece in pieces))]


def read_whole(raw: bytes, *, completions: bool = False) -> tuple[Piece | None, Ended]:
    """The one body of an answer: its text, if any, and its end. Raises Unavailable."""
    read: _Reads = _completion_piece if completions else partial(_piece, "message")
    with _reading():
        value = _json(raw)
        choice, usage = value["choices"][0], value["usage"]
        end = _ended(choice.get("finish_reason"), usage)
        return read(choice, end.usage.completion), end


def read_embeddings(raw: bytes, count: int) -> Embedded:
    """The one body of embeddings: `count` vectors of one length. Raises Unavailable."""
    with _reading():
        value = _json(raw)
        by_index = {_count(item["index"]): _vector(item["embedding"]) for item in value["data"]}
        vectors = tuple(by_index[index] for index in range(count))
        if len(value["data"]) != count or len({len(vector) for vector in vectors}) != 1:
            raise ValueError
        usage = value["usage"]
        return Embedded(vectors, TokenUsage(_count(usage["prompt_tokens"]), 0))


def _vector(value: Any) -> bytes:
    vector = unpack_base64(value) if isinstance(value, str) else pack(value)
    if not vector:
        raise ValueError
    return vector


def _ended(reason: Any, usage: Any) -> Ended:
    if reason not in ("stop", "length") or not isinstance(usage, dict):
        raise failed("The engine's server ended without a reason or token counts.")
    try:
        return Ended(reason, _usage(usage))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise failed("The engine's server gave token counts that are none.") from None


def _completion_piece(choice: Json, tokens: int) -> Piece | None:
    """What one choice of a completion says, or None."""
    text = _text(choice.get("text") or "")
    told = choice.get("logprobs") or {}
    names = told.get("tokens") or ()
    rivals = told.get("top_logprobs") or [None] * len(names)
    logprobs = tuple(
        TokenLogprob((name := _text(token)), name.encode(), _number(logprob), _rivals(others))
        for token, logprob, others in zip(
            names, told.get("token_logprobs") or (), rivals, strict=True
        )
    )
    if not text and not logprobs:
        return None
    return Piece(text, len(logprobs) or tokens, logprobs)


def _rivals(others: Json | None) -> tuple[TokenLogprob, ...]:
    """A completion's likeliest tokens, the likeliest first."""
    found = [(_text(token), _number(logprob)) for token, logprob in (others or {}).items()]
    found.sort(key=lambda one: -one[1])
    return tuple(TokenLogprob(token, token.encode(), logprob) for token, logprob in found)


def _number(value: Any) -> float:
    logprob = float(value)
    if math.isnan(logprob) or logprob == math.inf:
        raise ValueError
    return max(logprob, LEAST_LOGPROB)


def _piece(where: str, choice: Json, tokens: int) -> Piece | None:
    """What one choice says, or None. `tokens` counts where no log probabilities do."""
    text = _text((choice.get(where) or {}).get("content") or "")
    found = ((choice.get("logprobs") or {}).get("content")) or ()
    logprobs = tuple(_logprob(entry, entry.get("top_logprobs")) for entry in found)
    if not text and not logprobs:
        return None
    return Piece(text, len(logprobs) or tokens, logprobs)


def _text(value: Any) -> str:
    """A text with a UTF-8 form: the halves of a pair that JSON allows alone are replaced."""
    if not isinstance(value, str):
        raise TypeError
    if value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _logprob(entry: Json, rivals: Any = None) -> TokenLogprob:
    raw, text, logprob = entry.get("bytes"), _text(entry["token"]), _number(entry["logprob"])
    if not (raw is None or isinstance(raw, list)):
        raise ValueError
    return TokenLogprob(
        text,
        text.encode() if raw is None else bytes(raw),
        logprob,
        tuple(_logprob(rival) for rival in rivals or ()),
    )


def _usage(value: Json) -> TokenUsage:
    prompt, completion = _count(value["prompt_tokens"]), _count(value["completion_tokens"])
    cached = (value.get("prompt_tokens_details") or {}).get("cached_tokens")
    reasoning = (value.get("completion_tokens_details") or {}).get("reasoning_tokens")
    return TokenUsage(
        prompt=prompt,
        completion=completion,
        cached=min(_count(cached or 0), prompt),
        reasoning=min(_count(reasoning or 0), completion),
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError
    return value


def failed(message: str) -> Unavailable:
    """The engine's fault, in our own words."""
    return Unavailable(message, code="engine_failed")


def named(body: bytes) -> tuple[str | None, str | None]:
    """The code and param of an OpenAI error, if they look like names."""
    try:
        error = json.loads(body)["error"]
        found = [error.get(name) for name in ("code", "param")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    code, param = (
        value if isinstance(value, str) and value.isidentifier() and len(value) <= 64 else None
        for value in found
    )
    return code, param
