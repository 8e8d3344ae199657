"""A model's folder: which of its files an engine may read, and their hashes.

Links that leave the folder are never followed, and no path out of a manifest is ever opened: a
manifest's paths are only looked up among the files that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cocoon.kernel.errors import ConfigurationError
from cocoon.models.manifest import ModelFile

_READ_BYTES: Final = 1 << 20
_MAX_DEPTH: Final = 32
# For people: no engine reads them, and a better README should not make another model.
_PAPER: Final = {"LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "README", "README.txt"}

Told = Callable[[str, int, int], None]  # path, bytes hashed so far, bytes of all files


@dataclass(slots=True)
class Tree:
    """What is in a folder. Paths are relative to it, with "/" between names."""

    files: dict[str, Path] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # hidden, __pycache__, paper
    refused: dict[str, str] = field(default_factory=dict)  # why


def walk(folder: Path, named: Iterable[str] = ()) -> Tree:
    """Everything in the folder; what is `named` is never skipped.

    Raises ConfigurationError if the folder itself cannot be read.
    """
    tree, root = Tree(), folder.resolve()
    _walk(root, root, "", frozenset(named), tree)
    return tree


def _walk(root: Path, here: Path, prefix: str, named: frozenset[str], tree: Tree) -> None:
    try:
        with os.scandir(here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        if not prefix:
            raise ConfigurationError(
                f"the folder {root} cannot be read ({error.strerror})"
            ) from None
        tree.refused[prefix.removesuffix("/")] = "cannot be read"
        return
    for entry in entries:
        path = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if path not in named and is_skipped(entry.name, is_folder=is_folder):
            tree.skipped.append(path)
        elif is_folder:
            if prefix.count("/") >= _MAX_DEPTH:
                tree.refused[path] = "lies too deep"
            else:
                _walk(root, here / entry.name, path + "/", named, tree)
        else:
            _take(root, here / entry.name, path, tree)


def _take(root: Path, place: Path, path: str, tree: Tree) -> None:
    try:
        real = place.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        tree.refused[path] = "is a link to nothing"
        return
    if not real.is_relative_to(root):
        tree.refused[path] = "is a link that leaves the folder"
    elif stat.S_ISDIR(mode):
        tree.refused[path] = "is a link to a folder"
    elif not stat.S_ISREG(mode):
        tree.refused[path] = "is not a file"
    else:
        tree.files[path] = real


def is_skipped(name: str, *, is_folder: bool) -> bool:
    """Whether a file or folder of this name is no part of a model."""
    is_paper = name in _PAPER or name.endswith(".md")
    return name.startswith(".") or name == "__pycache__" or (is_paper and not is_folder)


def hash_file(path: Path, told: Callable[[int], None] | None = None) -> tuple[str, int]:
    """SHA-256 and size of a file, read in pieces; `told` hears of each piece's bytes.

    Raises ConfigurationError if it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
                size += len(piece)
                if told is not None:
                    told(len(piece))
    except OSError:
        raise ConfigurationError(f"the model's file {path} cannot be read") from None
    return digest.hexdigest(), size


def hash_files(files: dict[str, Path], told: Told | None = None) -> tuple[ModelFile, ...]:
    """All of these hashed, in the order of their paths. Raises ConfigurationError."""
    made, done = [], 0
    total = total_bytes(files.values()) if told is not None else 0
    for path in sorted(files):

        def heard(size: int, path: str = path) -> None:
            nonlocal done
            done += size
            if told is not None:
                told(path, done, total)

        digest, size = hash_file(files[path], heard)
        made.append(ModelFile(path=path, size_bytes=size, sha256=digest))
    return tuple(made)


def total_bytes(files: Iterable[Path]) -> int:
    """Their size together. Raises ConfigurationError."""
    try:
        return sum(path.stat().st_size for path in files)
    except OSError:
        raise ConfigurationError("a file of the model cannot be read") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ConfigurationError."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise TypeError
    except (OSError, ValueError, TypeError, RecursionError):
        raise ConfigurationError(f"{folder} holds no readable config.json") from None
    return config
