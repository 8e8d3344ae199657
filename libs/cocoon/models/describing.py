"""From a model's folder to its manifest. The same folder gives the same id everywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cocoon.kernel.errors import ConfigurationError
from cocoon.models.folder import Told, Tree, hash_files, read_config, walk
from cocoon.models.manifest import MAX_FILES, MAX_PATH, PATH, ModelFile, ModelManifest

EMBEDDED: Final = "onnxruntime-cpu"  # the agent's own engine
ONNX_FILES: Final = ("config.json", "model.onnx", "tokenizer.json")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model")
_path = re.compile(PATH.removeprefix("^").removesuffix("$"))


def describe_folder(
    folder: Path,
    name: str,
    *,
    engine: str | None = None,
    quantisation: str | None = None,
    arguments: Mapping[str, str] | None = None,
    tree: Tree | None = None,
    told: Told | None = None,
) -> ModelManifest:
    """Hash every file of a folder that an engine may read, and say what config.json says.

    Without an engine: the embedded one for a folder with a model.onnx, else openai-compatible.
    Raises ConfigurationError, and pydantic's ValidationError for words that no manifest takes.
    """
    tree = tree or walk(folder)
    check(folder, tree)
    engine = engine or (EMBEDDED if "model.onnx" in tree.files else "openai-compatible")
    config = read_config(folder) if "config.json" in tree.files else {}
    if engine == EMBEDDED:
        check_onnx(tree.files, folder)
        if "context_length" not in config:
            raise ConfigurationError(f"{folder}/config.json names no context_length")
        arguments = {
            "context_tokens": str(config["context_length"]),
            **({"kind": str(config["kind"])} if "kind" in config else {}),
            **(arguments or {}),
        }
    files = hash_files(tree.files, told)
    return ModelManifest(
        name=name,
        engine=engine,
        files=files,
        tokenizer_sha256=_tokenizer(files),
        quantisation=quantisation or _quantisation(config, engine),
        arguments=dict(arguments or {}),
    )


def check(folder: Path, tree: Tree) -> None:
    """Raises ConfigurationError for a folder that no manifest can describe."""
    for path, why in sorted(tree.refused.items()):
        raise ConfigurationError(
            f"{path!a} in {folder} {why}; a model's folder holds its files itself (`cp -rL` "
            "copies a folder with what its links lead to)"
        )
    for path in tree.files:
        if len(path) > MAX_PATH or _path.fullmatch(path) is None:
            raise ConfigurationError(
                f"the file name {path!a} cannot be in a manifest: printable ASCII without a "
                f"backslash, {MAX_PATH} signs at most; rename it"
            )
    if not tree.files:
        raise ConfigurationError(f"{folder} holds no file of a model")
    if len(tree.files) > MAX_FILES:
        raise ConfigurationError(
            f"{folder} holds {len(tree.files):,} files; a manifest names {MAX_FILES:,} at most"
        )


def check_onnx(paths: Mapping[str, object], folder: Path) -> None:
    """Raises ConfigurationError if a file that the embedded engine loads is not among these."""
    for path in ONNX_FILES:
        if path not in paths:
            raise ConfigurationError(
                f"{path} is missing for {folder}: the embedded engine loads {', '.join(ONNX_FILES)}"
            )


def _tokenizer(files: tuple[ModelFile, ...]) -> str | None:
    by_path = {file.path: file.sha256 for file in files}
    return next((by_path[path] for path in _TOKENIZERS if path in by_path), None)


def _quantisation(config: dict[str, Any], engine: str) -> str:
    """What config.json says of it, in our words or in those of the Hugging Face folders."""
    other = config.get("quantization_config")
    method = other.get("quant_method") if isinstance(other, dict) else None
    default = "int8-weights" if engine == EMBEDDED else "unstated"
    kind = config.get("torch_dtype") or config.get("dtype")
    return str(config.get("quantisation") or method or kind or default)
