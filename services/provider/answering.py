"""Pure parts of an answer: what waits to be sealed, how it is told, what it costs.

Content lives here for as long as one job; none of it prints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cocoon.chat import (
    EMBEDDINGS,
    KINDS,
    AnyRequest,
    Capabilities,
    Kind,
    TextAnswer,
    TokenLogprob,
    TokenUsage,
    answer_json,
    check_kind,
    error_body,
    parse_request,
)
from cocoon.chat.embeddings import (
    Embedded,
    EmbeddingRequest,
    embedding_answer,
    embedding_usage,
)
from cocoon.contracts.events import Quote
from cocoon.domain import pricing
from cocoon.domain.metering import hidden_tokens
from cocoon.kernel.errors import BadRequest, CocoonError, NotFound, Rejected
from cocoon.sealing import (
    OpenedRequest,
    Profile,
    RequestHeader,
    ResponseSealer,
    Status,
    public_count,
)
from services.provider.backends.base import Ended, Piece
from services.provider.fitting import AnswerSize, beginning

FIXED_ANSWER_BYTES: Final = 16 * 1024  # the head, usage, receipt and one object's padding
TOKEN_ANSWER_BYTES: Final = 1024  # one token alone in its record, and what surrounds it
TOKEN_VECTOR_BYTES: Final = 4096  # a share of one input's vector: inputs have several tokens
NOTHING: Final = TokenUsage(prompt=0, completion=0)


@dataclass(frozen=True, slots=True)
class Bill:
    """A receipt's counts (input, cached, output, reasoning) and price in nanoTON."""

    counts: tuple[int, int, int, int]
    price_nanoton: int


def bill(status: Status, usage: TokenUsage, header: RequestHeader, quote: Quote) -> Bill:
    """What the receipt says and claims: refused and failed jobs are free.

    Counts are exact, or rounded up as the padding profile demands, and priced as shown.
    """
    if status in (Status.REFUSED, Status.FAILED):
        return Bill((0, 0, 0, 0), 0)
    profile = header.profile
    input_tokens = public_count(profile, usage.prompt, header.max_input_tokens)
    output_tokens = public_count(profile, usage.completion, header.max_output_tokens)
    cached = _part(profile, usage.cached, input_tokens)
    reasoning = _part(profile, usage.reasoning, output_tokens)
    counts = pricing.TokenCounts(input_tokens, cached, output_tokens, reasoning)
    return Bill(
        (counts.input, counts.cached_input, counts.output, counts.reasoning),
        pricing.price(quote, counts),
    )


def _part(profile: Profile, tokens: int, whole: int) -> int:
    """A part of a count, in the form that the profile gives counts."""
    return public_count(profile, tokens, whole)


def check_price(header: RequestHeader, quote: Quote) -> None:
    """Raises BadRequest if the job could cost more than its header allows."""
    dearest = pricing.greatest_price(quote, header.max_input_tokens, header.max_output_tokens)
    if dearest > header.max_price_nanoton:
        raise BadRequest(
            "max_price is below what this request can cost within its token bounds; raise it or "
            "lower the bounds.",
            param="max_price", code="max_price_too_low",
        )  # fmt: skip


def read_request(
    opened: OpenedRequest, *, model_names: tuple[str, ...], capabilities: Capabilities,
    kind: Kind = "chat",
) -> AnyRequest:  # fmt: skip
    """The request inside an opened envelope, of the form that its endpoint has.

    Raises BadRequest or NotFound, told inside.
    """
    if opened.endpoint not in KINDS:
        raise NotFound(f"This network serves {', '.join(KINDS)}.", code="unsupported_endpoint")
    check_kind(opened.endpoint, kind, model_names[0])
    request = parse_request(opened.endpoint, opened.body, capabilities=capabilities)
    if request.model not in model_names:
        raise NotFound(
            "The request's body names another model than it was sealed for.",
            param="model", code="model_not_found",
        )  # fmt: skip
    if bool(request.stream) != opened.header.stream:
        raise BadRequest(
            "The request's 'stream' and its sealed header differ.",
            param="stream", code="invalid_value",
        )  # fmt: skip
    return request


def spooled_bytes(opened: OpenedRequest, most: int) -> int:
    """Room on disk that a job's sealed answer is expected to need, at most `most` bytes."""
    header = opened.header
    expected = TOKEN_ANSWER_BYTES * header.max_output_tokens
    if opened.endpoint == EMBEDDINGS:
        expected = TOKEN_VECTOR_BYTES * header.max_input_tokens
    return min(most, FIXED_ANSWER_BYTES + expected)


class Telling:
    """One answer on its way into sealed records: what waits, what was said, how it ended."""

    def __init__(
        self, sealer: ResponseSealer, answer: TextAnswer | None, *, profile: Profile, stream: bool
    ) -> None:
        self._sealer = sealer
        self._answer = answer
        self._stream = stream
        self._size = None if answer is None else AnswerSize(profile, answer, stream=stream)
        self._waiting_json_bytes = 0
        self._begun = False
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._waiting_tokens = 0
        self._told_tokens = 0
        self._waiting_bytes = self._told_bytes = 0  # of text as UTF-8
        self._closing: list[tuple[str, bytes]] = []
        self.prompt_tokens = 0
        self.usage = NOTHING
        self.status: Status | None = None

    @property
    def tokens_waiting(self) -> int:
        """Tokens whose text may be sealed now; one body waits for its end."""
        return self._waiting_tokens if self._stream else 0

    @property
    def bytes_waiting(self) -> int:
        held = sum(map(len, self._text)) if self._stream else 0
        return held + sum(len(content) for _, content in self._closing)

    @property
    def ended(self) -> bool:
        return self.status is not None

    @property
    def made(self) -> TokenUsage:
        """What is owed for what was told and what waits to be; before the first token, nothing."""
        tokens = self._told_tokens + self._waiting_tokens
        return self._declared(TokenUsage(self.prompt_tokens, tokens)) if tokens else NOTHING

    def _declared(self, usage: TokenUsage) -> TokenUsage:
        """Tokens that no text shows are declared as reasoning: billing holds every answer to it."""
        shown_bytes = self._told_bytes + self._waiting_bytes
        hidden = hidden_tokens(usage.completion, usage.reasoning, shown_bytes)
        return usage if hidden == usage.reasoning else replace(usage, reasoning=hidden)

    def add(self, piece: Piece, room_bytes: int) -> bool:
        """Take a piece, if the answer could still end within `room_bytes` of sealed ones.

        Otherwise it ends here, with what fits, as one that has reached its length: False.
        """
        if self._took(piece, room_bytes):
            return True
        fitting = beginning(piece, lambda part: self._fits(self._bytes_of(part), room_bytes))
        if fitting is not None:
            self._took(fitting, room_bytes)
        self.end(Ended("length", self.made))
        return False

    def _bytes_of(self, piece: Piece) -> int:
        assert self._size is not None  # noqa: S101 - nothing is made before it was read
        return self._size.of_piece(piece)

    def _fits(self, more_bytes: int, room_bytes: int) -> bool:
        assert self._size is not None  # noqa: S101 - as above
        return self._size.whole(self._waiting_json_bytes + more_bytes) <= room_bytes

    def _took(self, piece: Piece, room_bytes: int) -> bool:
        more_bytes = self._bytes_of(piece)
        if not self._fits(more_bytes, room_bytes):
            return False
        self._text.append(piece.text)
        self._logprobs += piece.logprobs
        self._waiting_tokens += piece.tokens
        self._waiting_bytes += len(piece.text.encode())
        self._waiting_json_bytes += more_bytes
        return True

    def end(self, ended: Ended) -> None:
        """The engine is done: tell the reason and the exact usage."""
        assert self._answer is not None  # noqa: S101 - nothing ends before it was read
        self.status = Status.COMPLETE if ended.reason == "stop" else Status.LENGTH
        self.usage = usage = self._declared(ended.usage)
        if self._stream:
            self._closing.append(("data", answer_json(self._answer.final_chunk(ended.reason))))
            if self._answer.request.include_usage:
                self._closing.append(("data", answer_json(self._answer.usage_chunk(usage))))
        else:
            whole = self._answer.completion(
                "".join(self._text), ended.reason, usage, self._logprobs
            )
            self._closing.append(("data", answer_json(whole)))
        self._closing.append(("usage", answer_json(usage.to_openai())))

    def tell_vectors(self, request: EmbeddingRequest, made: Embedded) -> None:
        """The engine is done, at once: one body, and nothing that was written."""
        self.status = Status.COMPLETE
        self.usage = made.usage
        self._closing = [
            ("data", answer_json(embedding_answer(request, made))),
            ("usage", answer_json(embedding_usage(made.usage))),
        ]

    def fail(self, error: CocoonError) -> None:
        """Refused (the request's fault) or failed (ours): an error record, and nothing is owed."""
        self.status = Status.REFUSED if isinstance(error, Rejected) else Status.FAILED
        self._drop_waiting()
        self._closing = [("error", error_body(error))]

    def cancel(self) -> None:
        """Stop here: what was sealed is what was delivered, and what is owed."""
        self.status = Status.CANCELLED
        self._drop_waiting()
        self.usage = self.made
        self._closing = [("usage", answer_json(self.usage.to_openai()))]

    def seal_waiting(self) -> bytes:
        """Seal all text that waits as one object, then, at the end, what closes the answer."""
        sealed = []
        if self._stream and self._answer is not None and (self._text or self._closing_data):
            if not self._begun:
                self._begun = True
                opening = self._answer.opening()
                if opening is not None:
                    sealed.append(self._sealer.data(answer_json(opening)))
            if self._text:
                chunk = self._answer.delta_chunk("".join(self._text), self._logprobs)
                sealed.append(self._sealer.data(answer_json(chunk)))
            self._told_tokens += self._waiting_tokens
            self._told_bytes += self._waiting_bytes
            self._drop_waiting()
        for kind, content in self._closing:
            sealed.append(getattr(self._sealer, kind)(content))
        self._closing.clear()
        return b"".join(sealed)

    @property
    def _closing_data(self) -> bool:
        return any(kind == "data" for kind, _ in self._closing)

    def _drop_waiting(self) -> None:
        self._text.clear()
        self._logprobs.clear()
        self._waiting_tokens = 0
        self._waiting_bytes = 0
        self._waiting_json_bytes = 0
