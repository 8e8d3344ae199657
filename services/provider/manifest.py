"""A model's manifest: what exactly is served. Its hash is the model id that clients seal to.

Two providers with the same id run the same files with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Hex32, MappingContract, Name
from cocoon.kernel import canonical
from cocoon.kernel.errors import ConfigurationError
from cocoon.kernel.ids import ModelId

ONNX_FILES: Final = ("config.json", "model.onnx", "tokenizer.json")
_READ_BYTES: Final = 1 << 20


class ModelFile(Contract):
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    size_bytes: Annotated[int, Field(ge=0, le=2**53)]
    sha256: Hex32


class ModelManifest(MappingContract):
    """Files, tokenizer, quantisation and engine arguments of one served model."""

    format: Literal[1] = 1
    name: Name
    engine: Name
    files: Annotated[tuple[ModelFile, ...], Field(max_length=4096)] = ()
    tokenizer_sha256: Hex32 | None = None
    quantisation: Name
    arguments: Annotated[dict[Name, str], Field(max_length=64)]

    @property
    def model_id(self) -> ModelId:
        """SHA-256 (hex) of the canonical manifest."""
        return ModelId(hashlib.sha256(self.to_canonical()).hexdigest())


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces. Raises ConfigurationError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    except OSError:
        raise ConfigurationError(f"the model's file {path} cannot be read") from None
    return digest.hexdigest()


def describe_onnx(folder: Path, name: str) -> ModelManifest:
    """The manifest of a model folder for the embedded engine, hashed from its files."""
    files = []
    for file_name in ONNX_FILES:
        digest = hash_file(folder / file_name)
        size = (folder / file_name).stat().st_size
        files.append(ModelFile(path=file_name, size_bytes=size, sha256=digest))
    config = read_config(folder)
    return ModelManifest(
        name=name,
        engine="onnxruntime-cpu",
        files=tuple(files),
        tokenizer_sha256=files[-1].sha256,
        quantisation=str(config.get("quantisation", "int8-weights")),
        arguments={"context_tokens": str(config["context_length"])},
    )


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


def verify(manifest: ModelManifest, folder: Path) -> None:
    """Check every file before it is served. Raises ConfigurationError naming a wrong one."""
    for file in manifest.files:
        if hash_file(folder / file.path) != file.sha256:
            raise ConfigurationError(
                f"{folder / file.path} is not the file that the model's manifest names; "
                "fetch the model again"
            )


def load(path: Path) -> ModelManifest:
    """Read a manifest file. Raises ConfigurationError."""
    try:
        return ModelManifest.model_validate(canonical.loads_object(path.read_bytes(), strict=False))
    except (OSError, ValueError):
        raise ConfigurationError(f"{path} is not a model manifest") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ConfigurationError."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise TypeError
    except (OSError, ValueError, TypeError):
        raise ConfigurationError(f"{folder} holds no readable config.json") from None
    return config
