"""OpenAI's embeddings: texts to vectors. Honoured whole or refused by name.

A vector is its numbers as float32, little-endian, four bytes each: what base64 carries as it is.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from cocoon.chat.parameters import Parameter, check_names, honoured
from cocoon.chat.request import Label, ModelName, Strict, loads, validated, whole_characters
from cocoon.chat.respond import Json, TokenUsage
from cocoon.kernel.errors import BadRequest

EMBEDDINGS: Final = "/v1/embeddings"
MAX_INPUTS: Final = 2048  # OpenAI's
MAX_REQUEST_TOKENS: Final = 65_536  # of all inputs together; what an offer of such a model takes
FLOAT_BYTES: Final = 4
_NUMBER_BYTES: Final = 26  # no float32 is longer in JSON, with its comma
_FRAME_BYTES: Final = 96  # what stands around one vector
_HEAD_BYTES: Final = 512

EMBEDDING_PARAMETERS: Final[dict[str, Parameter]] = {
    "input": honoured("One text or up to 2,048 of them, none empty. Token ids are refused."),
    "model": honoured("A model that the network offers."),
    "dimensions": honoured("The model's own number; no vector is cut."),
    "encoding_format": honoured("float or base64."),
    "user": honoured("Sealed with the texts, seen by the enclave only, and not stored."),
}
_Text = Annotated[str, Field(min_length=1), AfterValidator(whole_characters)]


class EmbeddingRequest(Strict):
    """The honoured parameters. `texts` are its inputs in their order."""

    model: ModelName
    input: Annotated[list[_Text], Field(min_length=1, max_length=MAX_INPUTS)]
    dimensions: Annotated[int, Field(ge=1, le=65_536)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: Label | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.input)

    @property
    def stream(self) -> bool:
        return False

    @property
    def include_usage(self) -> bool:
        return False

    @property
    def is_base64(self) -> bool:
        return self.encoding_format == "base64"


def parse_embedding_request(body: bytes | dict[str, Any]) -> EmbeddingRequest:
    """Parse a request body and check every parameter. Raises BadRequest as chat's parser does."""
    fields = loads(body)
    check_names(fields, EMBEDDING_PARAMETERS)
    given = fields.get("input")
    if isinstance(given, str):
        fields["input"] = [given]
    elif isinstance(given, list) and any(isinstance(item, int | list) for item in given):
        raise BadRequest(
            "Unsupported value for 'input': token ids mean another text to each tokenizer; send "
            "the texts. (LangChain: check_embedding_ctx_length=False.)",
            param="input", code="unsupported_value",
        )  # fmt: skip
    elif given is None:
        fields.pop("input", None)
    return validated(EmbeddingRequest, fields)


def check_dimensions(request: EmbeddingRequest, dimensions: int) -> None:
    """Raises BadRequest for a wish that a model of so many dimensions does not meet."""
    if request.dimensions in (None, dimensions):
        return
    raise BadRequest(
        f"Unsupported value for 'dimensions': this model's vectors have {dimensions} numbers; "
        "leave it out.",
        param="dimensions", code="unsupported_value",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an engine made: a vector for each input, in their order, and the tokens it read."""

    vectors: tuple[bytes, ...] = field(repr=False)
    usage: TokenUsage


def embedding_answer(request: EmbeddingRequest, made: Embedded) -> Json:
    """The one body of an answer."""
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if request.is_base64 else floats(vector),
            }
            for index, vector in enumerate(made.vectors)
        ],
        "model": request.model,
        "usage": embedding_usage(made.usage),
    }


def embedding_usage(usage: TokenUsage) -> Json:
    """OpenAI's usage of embeddings: nothing is written, so input alone is counted."""
    return {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}


def embedding_bytes(request: EmbeddingRequest, dimensions: int) -> int:
    """At most so many bytes of JSON is the body for this request."""
    numbers = (
        -(-dimensions * FLOAT_BYTES // 3) * 4 if request.is_base64 else (dimensions * _NUMBER_BYTES)
    )
    return _HEAD_BYTES + len(request.model) * 6 + len(request.input) * (numbers + _FRAME_BYTES)


def floats(vector: bytes) -> list[float]:
    """Its numbers, each exactly."""
    return list(struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector))


def pack(numbers: Sequence[float]) -> bytes:
    """Numbers as a vector. Raises ValueError for one that is no finite float32."""
    try:
        vector = struct.pack(f"<{len(numbers)}f", *numbers)
    except (struct.error, OverflowError):
        raise ValueError("a vector is numbers of float32") from None
    return finite(vector)


def unpack_base64(text: str) -> bytes:
    """A vector out of base64. Raises ValueError."""
    try:
        vector = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a vector is base64") from None
    if len(vector) % FLOAT_BYTES:
        raise ValueError("a vector is whole numbers of float32")
    return finite(vector)


def finite(vector: bytes) -> bytes:
    """The vector. Raises ValueError for infinities and what is no number."""
    if not all(-3.5e38 < number < 3.5e38 for number in floats(vector)):
        raise ValueError("a vector is finite")
    return vector


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")
