"""OpenAI's chat completions, completions and embeddings: what is honoured, what is refused, what an
answer looks like.

The client refuses early with it, the enclave enforces it. Pure: no network, no model, no clock.
"""

from cocoon.chat.completions import (
    COMPLETION_PARAMETERS,
    COMPLETIONS,
    CompletionAnswer,
    CompletionRequest,
    parse_completion_request,
)
from cocoon.chat.embeddings import (
    EMBEDDING_PARAMETERS,
    EMBEDDINGS,
    MAX_REQUEST_TOKENS,
    Embedded,
    EmbeddingRequest,
    parse_embedding_request,
)
from cocoon.chat.endpoints import (
    KINDS,
    AnyRequest,
    Kind,
    TextRequest,
    check_kind,
    parse_request,
)
from cocoon.chat.parameters import PARAMETERS, Parameter, Support
from cocoon.chat.request import (
    EVERYTHING,
    Capabilities,
    ChatRequest,
    Message,
    parse_chat_request,
)
from cocoon.chat.respond import (
    ENDPOINT,
    Answer,
    FinishReason,
    TokenLogprob,
    TokenUsage,
    answer_json,
    error_body,
    to_json,
)

TextAnswer = Answer | CompletionAnswer

__all__ = [
    "COMPLETIONS",
    "COMPLETION_PARAMETERS",
    "EMBEDDINGS",
    "EMBEDDING_PARAMETERS",
    "ENDPOINT",
    "EVERYTHING",
    "KINDS",
    "MAX_REQUEST_TOKENS",
    "PARAMETERS",
    "Answer",
    "AnyRequest",
    "Capabilities",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "Embedded",
    "EmbeddingRequest",
    "FinishReason",
    "Kind",
    "Message",
    "Parameter",
    "Support",
    "TextAnswer",
    "TextRequest",
    "TokenLogprob",
    "TokenUsage",
    "answer_json",
    "check_kind",
    "error_body",
    "parse_chat_request",
    "parse_completion_request",
    "parse_embedding_request",
    "parse_request",
    "to_json",
]
