"""How many bytes an answer takes once it is sealed, so that it ends before it outgrows its bound.

Pure, and never too little: an answer that is cut at its bound was delivered, and is paid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cocoon.chat import TextAnswer, TokenUsage, answer_json
from cocoon.chat.embeddings import EmbeddingRequest, embedding_bytes, embedding_usage
from cocoon.kernel.errors import BadRequest
from cocoon.sealing import Profile
from cocoon.sealing.pacing import TICK_FRAME_BYTES, TICKS_PER_END
from cocoon.sealing.padding import RecordType, SizeRule, response_rule
from cocoon.sealing.receipt import RECEIPT_BYTES
from cocoon.sealing.records import FRAME_LENGTH_BYTES, STREAM_TAG_BYTES
from services.provider.backends.base import Piece

PREFIX_BYTES: Final = 128  # the response's head and its stream's header
MOST: Final = TokenUsage(2**40, 2**40, 2**40, 2**40)  # no usage is longer in JSON
HALVINGS: Final = 10  # of a piece that is cut: to a thousandth of it
QUOTES_BYTES: Final = 2


class AnswerSize:
    """The sealed bytes of one answer's parts, from the lengths of their JSON."""

    def __init__(self, profile: Profile, answer: TextAnswer, *, stream: bool) -> None:
        self._rule = response_rule(profile)
        self._answer = answer
        usage_chunk = [answer.usage_chunk(MOST)] if answer.request.include_usage else []
        opening = [chunk] if (chunk := answer.opening()) is not None else []
        around = [*opening, answer.final_chunk("length"), *usage_chunk] if stream else []
        body = answer.delta_chunk("") if stream else answer.completion("", "length", MOST)
        self._body_bytes = len(answer_json(body))
        self.closing_bytes = (
            PREFIX_BYTES
            + sum(self._sealed(RecordType.DATA, len(answer_json(chunk))) for chunk in around)
            + self._sealed(RecordType.USAGE, len(answer_json(MOST.to_openai())))
            + self._sealed(RecordType.RECEIPT, RECEIPT_BYTES)
            + (TICKS_PER_END * TICK_FRAME_BYTES if profile is Profile.P1 else 0)
        )

    def of_piece(self, piece: Piece) -> int:
        """Bytes of JSON that a piece adds to the object that tells it."""
        size = len(answer_json(piece.text)) - QUOTES_BYTES
        if self._answer.request.wants_logprobs:
            size += sum(self._answer.logprob_bytes(token) for token in piece.logprobs)
        return size

    def whole(self, pieces_bytes: int) -> int:
        """Sealed bytes still to come, were the answer to end with pieces of so much JSON."""
        return self.closing_bytes + self._sealed(RecordType.DATA, self._body_bytes + pieces_bytes)

    def _sealed(self, kind: RecordType, content_bytes: int) -> int:
        return _sealed(self._rule, kind, content_bytes)


def _sealed(rule: SizeRule, kind: RecordType, content_bytes: int) -> int:
    step = rule.capacity()
    parts = 0 if kind is RecordType.RECEIPT else max(content_bytes - 1, 0) // step
    sizes = (
        parts * rule.size_for(RecordType.PART, step)
        + rule.size_for(kind, content_bytes - parts * step)
    )  # fmt: skip
    return sizes + (parts + 1) * (FRAME_LENGTH_BYTES + STREAM_TAG_BYTES)


def check_embeddings_fit(
    request: EmbeddingRequest, dimensions: int, profile: Profile, room_bytes: int
) -> None:
    """Raises BadRequest before anything is computed whose answer would be too large to send."""
    rule = response_rule(profile)
    usage = len(answer_json(embedding_usage(MOST)))
    needed = (
        PREFIX_BYTES
        + _sealed(rule, RecordType.DATA, embedding_bytes(request, dimensions))
        + _sealed(rule, RecordType.USAGE, usage)
        + _sealed(rule, RecordType.RECEIPT, RECEIPT_BYTES)
    )
    if needed > room_bytes:
        raise BadRequest(
            f"The vectors of {len(request.input)} inputs may take {needed:,} bytes, more than the "
            f"{room_bytes:,} that one answer may have; send fewer inputs at once"
            + ("." if request.is_base64 else ", or ask for encoding_format base64."),
            param="input", code="too_many_inputs",
        )  # fmt: skip


def beginning(piece: Piece, fits: Callable[[Piece], bool]) -> Piece | None:
    """About the longest beginning of a piece that fits; None when not one token does."""
    low, high = 0, piece.tokens
    for _ in range(HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_cut(piece, middle)) else (low, middle)
    return _cut(piece, low) if low else None


def _cut(piece: Piece, tokens: int) -> Piece:
    """About so many tokens of it: where a joined piece's tokens end in its text is not known."""
    end = len(piece.text) * tokens // piece.tokens
    return replace(
        piece, text=piece.text[:end], tokens=tokens, logprobs=piece.logprobs[:tokens]
    )  # fmt: skip
