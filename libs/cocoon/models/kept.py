"""Manifests as files. A file holds the canonical bytes: `sha256sum` of it is the model id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cocoon.kernel.errors import ConfigurationError, Conflict
from cocoon.models.manifest import ModelManifest, parse

_MAX_BYTES: Final = 16 * 1024 * 1024


def load(path: Path) -> ModelManifest:
    """Read a manifest file. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError
        return parse(data)
    except (OSError, ValueError):
        raise ConfigurationError(f"{path} is not a model manifest") from None


def keep(manifest: ModelManifest, path: Path, *, force: bool = False) -> bool:
    """Write a manifest, whole or not at all; False if the very same is there already.

    Raises Conflict for another one of that name without `force`, ConfigurationError for a place
    that cannot be written.
    """
    data = manifest.to_canonical()
    try:
        there = path.read_bytes() if path.exists() else None
        if there == data:
            return False
        if there is not None and not force:
            raise Conflict(
                f"{path} holds another manifest; --force replaces it, --to FILE spares it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})") from None
    return True


def place_of(folder: Path, name: str) -> Path:
    """The file of a name in a folder of manifests, whatever signs the name has."""
    return folder / f"{quote(name, safe='')}.json"


def kept_in(folder: Path) -> Iterator[tuple[Path, ModelManifest | None]]:
    """Each manifest file of a folder, with None for one that cannot be read as one."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, load(path)
        except ConfigurationError:
            yield path, None
