"""What the agent asks of an engine, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, runtime_checkable

from cocoon.chat import (
    Capabilities,
    ChatRequest,
    Embedded,
    EmbeddingRequest,
    FinishReason,
    TextRequest,
    TokenLogprob,
    TokenUsage,
)
from cocoon.kernel.errors import BadRequest
from cocoon.telemetry.metrics import ENGINE_ELSEWHERE


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was taken. Its token count, where the engine tells it before the end."""

    prompt_tokens: int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that follows, the tokens it took, and their log probabilities if asked for."""

    text: str = field(repr=False)
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """The last output of a whole answer."""

    reason: FinishReason
    usage: TokenUsage


Output = Started | Piece | Ended


@dataclass(slots=True)
class EngineLoad:
    """What an engine does for others than this agent, as its server last said: `elsewhere`."""

    elsewhere: int = 0

    def told(self, total: int, *, own: int) -> None:
        """The server has `total` requests, of which `own` are this agent's."""
        self._is(max(0, total - own))

    def closed(self) -> None:
        """The engine has ended: nobody asks its server for its load any more."""
        self._is(0)

    def _is(self, elsewhere: int) -> None:
        ENGINE_ELSEWHERE.inc(amount=elsewhere - self.elsewhere)  # one gauge is the sum of all
        self.elsewhere = elsewhere


class Engine(Protocol):
    """What every engine is to the agent. It serves one model."""

    capabilities: Capabilities
    system_fingerprint: str
    context_tokens: int  # what one text, or a conversation and its answer, may have
    request_tokens: int  # what its offer takes: the same, but for several inputs at once

    async def start(self) -> None:
        """Be ready to answer. Raises ConfigurationError or Unavailable."""

    async def healthy(self) -> bool:
        """Whether a request would be served now."""

    async def close(self) -> None:
        """Stop everything; running requests end with Unavailable."""


@runtime_checkable
class Backend(Engine, Protocol):
    """An engine that writes: chat and completions."""

    kind: Literal["chat"]

    def generate(
        self, request: TextRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        """Started, pieces, Ended. Closing the generator cancels the work.

        Raises BadRequest (a prompt over max_input_tokens or the context), Unavailable,
        RateLimited. Never gives more than max_output_tokens.
        """


@runtime_checkable
class Embedder(Engine, Protocol):
    """An engine that turns texts into vectors. Its context is that of one input."""

    kind: Literal["embeddings"]
    dimensions: int

    async def embed(self, request: EmbeddingRequest, *, max_input_tokens: int) -> Embedded:
        """A vector for each input, in their order, and the tokens that were read.

        Nothing is cut short: raises BadRequest for an input over the context or inputs that have
        more than max_input_tokens together; Unavailable, RateLimited. Cancelling it stops the work.
        """


PROMPT_TOO_LONG: Final = "context_length_exceeded"


def prompt_too_long(
    request: TextRequest, bound: int, *, tokens: int | None = None, context_tokens: int,
    max_output_tokens: int,
) -> BadRequest:  # fmt: skip
    """A prompt of more than `bound` tokens; `tokens` None: the engine does not say how many."""
    has = "too many" if tokens is None else str(tokens)
    chat = isinstance(request, ChatRequest)
    param, words = ("messages", " or max_completion_tokens") if chat else ("prompt", "")
    return BadRequest(
        f"This request has {has} input tokens; at most {bound} fit: the model's context is "
        f"{context_tokens} and {max_output_tokens} of it are kept for the answer. Shorten the "
        f"{param}, or keep fewer for the answer with max_tokens{words}.",
        param=param, code=PROMPT_TOO_LONG,
    )  # fmt: skip


def input_too_long(index: int, tokens: int | None, context_tokens: int) -> BadRequest:
    """An input that the model cannot read whole; `tokens` None: how many is not known."""
    has = "more tokens" if tokens is None else f"{tokens} tokens"
    return BadRequest(
        f"Input {index} has {has} and this model reads {context_tokens} of one input; nothing is "
        "cut short. Send it in parts.",
        param="input", code=PROMPT_TOO_LONG,
    )  # fmt: skip


def inputs_too_long(tokens: int, bound: int) -> BadRequest:
    """Inputs that have more tokens together than the request may use."""
    return BadRequest(
        f"These inputs have {tokens} tokens together; at most {bound} fit one request. Send fewer "
        "at once.",
        param="input", code=PROMPT_TOO_LONG,
    )  # fmt: skip


def no_completions() -> BadRequest:
    """This engine writes in conversations only."""
    return BadRequest(
        "This model's engine serves no completions; send a chat completion.",
        param="model", code="wrong_endpoint",
    )  # fmt: skip
