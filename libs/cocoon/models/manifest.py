"""A model's manifest: what exactly is served. Its hash is the model id that clients seal to.

Two providers with the same id run the same files with the same arguments. Nothing is read here.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from cocoon.contracts.base import Contract, Hex32, MappingContract, Name
from cocoon.kernel import canonical
from cocoon.kernel.ids import ModelId

MAX_FILES: Final = 4096
# Of a document on the network: quoted in an answer of the bus it at most doubles, and 1 MiB is
# what the bus carries. Some 1,500 shards; a longer manifest works and is not published.
MAX_PUBLISHED_BYTES: Final = 256 * 1024
CHAT: Final[Literal["chat"]] = "chat"
EMBEDDINGS: Final[Literal["embeddings"]] = "embeddings"
# Printable ASCII without "/" and "\": other alphabets have several byte forms of one name.
_SIGN: Final = r"[\x20-\x2d\x30-\x5b\x5d-\x7e]"  # and no dot
_STEP: Final = rf"(?:\.{{0,2}}{_SIGN}(?:{_SIGN}|\.)*|\.{{3}}(?:{_SIGN}|\.)*)"  # never "." or ".."
PATH: Final = rf"^{_STEP}(?:/{_STEP})*$"
MAX_PATH: Final = 512


class ModelFile(Contract):
    """One file. `path` is relative to the model's folder and never leaves it."""

    path: Annotated[str, Field(max_length=MAX_PATH, pattern=PATH)]
    size_bytes: Annotated[int, Field(ge=0, le=2**53)]
    sha256: Hex32


class ModelManifest(MappingContract):
    """Files, tokenizer, quantisation and engine arguments of one served model."""

    format: Literal[1] = 1
    name: Name
    engine: Name
    files: Annotated[tuple[ModelFile, ...], Field(max_length=MAX_FILES)] = ()
    tokenizer_sha256: Hex32 | None = None
    quantisation: Name
    arguments: Annotated[dict[Name, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]

    @field_validator("files")
    @classmethod
    def _in_order(cls, files: tuple[ModelFile, ...]) -> tuple[ModelFile, ...]:
        """By path: the order in which a folder was read must not change the id."""
        if len({file.path for file in files}) < len(files):
            raise ValueError("a file is named twice")
        return tuple(sorted(files, key=lambda file: file.path))

    @field_validator("arguments")
    @classmethod
    def _known_kind(cls, arguments: dict[str, str]) -> dict[str, str]:
        if arguments.get("kind", CHAT) not in (CHAT, EMBEDDINGS):
            raise ValueError("a model is for chat or for embeddings")
        return arguments

    @property
    def model_id(self) -> ModelId:
        """SHA-256 (hex) of the canonical manifest."""
        return ModelId(hashlib.sha256(self.to_canonical()).hexdigest())

    @property
    def kind(self) -> Literal["chat", "embeddings"]:
        """What the model is for, its argument `kind`; chat where none is stated."""
        return EMBEDDINGS if self.arguments.get("kind") == EMBEDDINGS else CHAT

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


def parse(data: bytes) -> ModelManifest:
    """A manifest out of JSON, however it is spaced and ordered. Raises ValueError."""
    return ModelManifest.model_validate(canonical.loads_object(data, strict=False))


def parse_published(data: bytes, model_id: str) -> ModelManifest:
    """The manifest of this id, from whoever sent it: believed only if the bytes hash to the id.

    Raises ValueError for any other bytes, and for those that no `model add` could have written.
    """
    if len(data) > MAX_PUBLISHED_BYTES or hashlib.sha256(data).hexdigest() != model_id:
        raise ValueError("these bytes do not have the model id as their SHA-256")
    manifest = parse(data)
    if manifest.to_canonical() != data:
        raise ValueError("the bytes are not the canonical form of a manifest")
    return manifest


def describe_server(
    name: str, arguments: dict[str, str], engine: str = "openai-compatible"
) -> ModelManifest:
    """The manifest of a model behind another server: what its operator states about it.

    No file is hashed, because the agent cannot see them; the id binds the statement only.
    """
    return ModelManifest(
        name=name,
        engine=engine,
        quantisation=arguments.get("quantisation", "as-served"),
        arguments=arguments,
    )
