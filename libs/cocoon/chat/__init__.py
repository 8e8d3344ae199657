"""OpenAI's chat completions contract: what is honoured, what is refused, what an answer looks like.

The client refuses early with it, the enclave enforces it. Pure: no network, no model, no clock.
"""

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

__all__ = [
    "ENDPOINT",
    "EVERYTHING",
    "PARAMETERS",
    "Answer",
    "Capabilities",
    "ChatRequest",
    "FinishReason",
    "Message",
    "Parameter",
    "Support",
    "TokenLogprob",
    "TokenUsage",
    "answer_json",
    "error_body",
    "parse_chat_request",
    "to_json",
]
