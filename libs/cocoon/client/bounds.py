"""How many tokens a request may use, before anybody but the enclave has counted them.

The client has no tokenizer. A byte-level tokenizer never makes more tokens than bytes, so bytes
bound the input; the hold is computed from these bounds and the price from the exact counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cocoon.chat import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TextRequest,
    to_json,
)
from cocoon.kernel.errors import BadRequest
from cocoon.sealing.padding import COUNT_STEP

MAX_TEMPLATE_TOKENS: Final = 256  # what a chat template may add once: a tenth of the context
TOKENS_PER_MESSAGE: Final = 8  # role markers and separators
TOKENS_PER_INPUT: Final = 2  # of embeddings: what a tokenizer puts around each
DEFAULT_OUTPUT_TOKENS: Final = 1024  # where the request names no bound


@dataclass(frozen=True, slots=True)
class TokenBounds:
    """The header's two bounds; their sum fits the context they were made for."""

    max_input_tokens: int
    max_output_tokens: int


def token_bounds(request: AnyRequest, context_tokens: int) -> TokenBounds:
    """Bounds for a model with this context.

    Input: the UTF-8 bytes of all text plus the template's share, at most what the context leaves
    (an enclave refuses a longer prompt, free of charge). Output: the request's own bound, else
    1,024 or what is left beside the input, but at least an eighth of the context; embeddings write
    nothing. Raises BadRequest(context_length_exceeded) when the asked output alone fills the
    context.
    """
    if isinstance(request, EmbeddingRequest):
        read = sum(len(text.encode()) + TOKENS_PER_INPUT for text in request.texts)
        return TokenBounds(min(_coarse(read), context_tokens), 0)
    input_bound = _input_bound(request, context_tokens)
    asked = request.max_output_tokens
    if asked is None:
        asked = min(
            DEFAULT_OUTPUT_TOKENS, max(context_tokens - input_bound, context_tokens // 8, 1)
        )
    if asked >= context_tokens:
        raise BadRequest(
            f"This model's context is {context_tokens} tokens and the request asks for up to "
            f"{asked} tokens of output; ask for fewer.",
            param=_bounded_by(request),
            code="context_length_exceeded",
        )
    return TokenBounds(min(input_bound, context_tokens - asked), asked)


def _bounded_by(request: TextRequest) -> str:
    """The parameter that bounds this request's output."""
    chat = isinstance(request, ChatRequest) and request.max_tokens is None
    return "max_completion_tokens" if chat else "max_tokens"


def _coarse(tokens: int) -> int:
    """Rounded up: the header is clear, and must not tell what padding hides."""
    return -(-tokens // COUNT_STEP) * COUNT_STEP


def _input_bound(request: TextRequest, context_tokens: int) -> int:
    if isinstance(request, CompletionRequest):
        return _coarse(len(request.prompt.encode()) + TOKENS_PER_INPUT)
    text_bytes = sum(len(message.content.encode()) for message in request.messages)
    schema = request.response_format.json_schema if request.response_format else None
    schema_bytes = len(to_json(schema)) if schema else 0
    template = min(MAX_TEMPLATE_TOKENS, context_tokens // 10)
    return text_bytes + schema_bytes + TOKENS_PER_MESSAGE * len(request.messages) + template
