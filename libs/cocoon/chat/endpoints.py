"""The endpoints that are sealed: which form a request has, and who may answer it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from cocoon.chat.completions import COMPLETIONS, CompletionRequest, parse_completion_request
from cocoon.chat.embeddings import EMBEDDINGS, EmbeddingRequest, parse_embedding_request
from cocoon.chat.request import EVERYTHING, Capabilities, ChatRequest, parse_chat_request
from cocoon.chat.respond import ENDPOINT
from cocoon.kernel.errors import BadRequest

Kind = Literal["chat", "embeddings"]  # of a model
TextRequest = ChatRequest | CompletionRequest
AnyRequest = TextRequest | EmbeddingRequest
KINDS: Final[dict[str, Kind]] = {
    ENDPOINT: "chat", COMPLETIONS: "chat", EMBEDDINGS: "embeddings",
}  # fmt: skip
_PARSERS: Final[dict[str, Callable[[bytes | dict[str, Any], Capabilities], AnyRequest]]] = {
    ENDPOINT: lambda body, can: parse_chat_request(body, capabilities=can),
    COMPLETIONS: lambda body, can: parse_completion_request(body, capabilities=can),
    EMBEDDINGS: lambda body, _: parse_embedding_request(body),
}


def parse_request(
    endpoint: str, body: bytes | dict[str, Any], *, capabilities: Capabilities = EVERYTHING
) -> AnyRequest:
    """Parse a body for its endpoint, one of KINDS. Raises BadRequest with `param` and `code`."""
    return _PARSERS[endpoint](body, capabilities)


def check_kind(endpoint: str, kind: Kind, model: str) -> None:
    """Raises BadRequest(wrong_endpoint) where a model of this kind does not serve it."""
    if KINDS[endpoint] == kind:
        return
    right = " or ".join(name for name, serves in KINDS.items() if serves == kind)
    raise BadRequest(
        f"The model {model!a} is for {right}; {endpoint} is not served with it.",
        param="model", code="wrong_endpoint",
    )  # fmt: skip
