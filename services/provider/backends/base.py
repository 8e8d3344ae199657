"""What the agent asks of an engine, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final, Protocol

from cocoon.chat import Capabilities, ChatRequest, FinishReason, TokenLogprob, TokenUsage
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
        self.elsewhere = max(0, total - own)
        ENGINE_ELSEWHERE.set(self.elsewhere)


class Backend(Protocol):
    """An engine that serves one model."""

    capabilities: Capabilities
    system_fingerprint: str
    context_tokens: int

    async def start(self) -> None:
        """Be ready to generate. Raises ConfigurationError or Unavailable."""

    async def healthy(self) -> bool:
        """Whether a request would be served now."""

    async def close(self) -> None:
        """Stop everything; running generations end with Unavailable."""

    def generate(
        self, request: ChatRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        """Started, pieces, Ended. Closing the generator cancels the work.

        Raises BadRequest (a prompt over max_input_tokens or the context), Unavailable,
        RateLimited. Never gives more than max_output_tokens.
        """


PROMPT_TOO_LONG: Final = "context_length_exceeded"


def prompt_too_long(
    bound: int, *, tokens: int | None = None, context_tokens: int, max_output_tokens: int
) -> BadRequest:
    """A prompt of more than `bound` tokens; `tokens` None: the engine does not say how many."""
    has = "too many" if tokens is None else str(tokens)
    return BadRequest(
        f"This request has {has} input tokens; at most {bound} fit: the model's context is "
        f"{context_tokens} and {max_output_tokens} of it are kept for the answer. Shorten the "
        "messages, or keep fewer for the answer with max_tokens or max_completion_tokens.",
        param="messages", code=PROMPT_TOO_LONG,
    )  # fmt: skip
