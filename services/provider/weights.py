"""What this agent serves: each model's manifest, every file checked before an engine loads.

The engine is made only from a manifest that came out of here.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from cocoon.agent.config import ModelConfig
from cocoon.bus.service import Stop
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.describing import EMBEDDED, check_onnx, describe_folder
from cocoon.models.folder import Told
from cocoon.models.kept import load
from cocoon.models.manifest import CHAT, describe_server
from cocoon.models.verifying import verify
from cocoon.telemetry.logs import get_logger
from services.provider.settings import SHIPPED_MODEL

_log = get_logger("services.provider.weights")
PROGRESS_S: Final = 2.0  # large files take minutes; a line so often says how far it is


class _LeftOffError(Exception):
    """The process was asked to end while its files were hashed."""


async def checked_manifest(model: ModelConfig, stop: Stop) -> ModelManifest | None:
    """The manifest, its files hashed in a thread; None if the process is to end meanwhile.

    Raises ConfigurationError for files that are not the manifest's, or a manifest that is not of
    what the model is configured to be.
    """
    ending = asyncio.create_task(stop.wait())
    told = _progress(ending)
    try:
        return await asyncio.to_thread(_manifest, model, told)
    except _LeftOffError:
        return None
    finally:
        ending.cancel()


def _progress(ending: asyncio.Task[None]) -> Told:
    said_s = time.monotonic()

    def told(_: str, done: int, total: int) -> None:
        nonlocal said_s
        if ending.done():
            raise _LeftOffError
        if time.monotonic() - said_s >= PROGRESS_S:
            said_s = time.monotonic()
            _log.info("model_hashing", offset=done, size_bytes=total)

    return told


def folder_of(model: ModelConfig) -> Path:
    """Where an embedded model's files are."""
    return model.folder or SHIPPED_MODEL


def _manifest(model: ModelConfig, told: Told) -> ModelManifest:
    if model.manifest_file is None:
        try:
            return _described(model, told)
        except ValidationError as error:
            names = ", ".join(str(one["loc"][0]) for one in error.errors() if one["loc"])
            raise ConfigurationError(
                f"the model's settings or its config.json hold what no manifest takes: {names}"
            ) from None
    manifest = load(model.manifest_file)
    _check_engine(model, manifest)
    _check_stated(model, manifest)
    # A manifest may name no file, for a model whose weights its operator does not have
    if model.engine == "embedded" or model.folder is not None:
        verify(manifest, folder_of(model), told)
        _log.info("model_verified", model_id=manifest.model_id, size_bytes=manifest.size_bytes)
    elif manifest.files:
        raise ConfigurationError(
            f"{model.manifest_file} names files and nobody looked at them; set the model's folder "
            "(COCOON_PROVIDER_MODEL_DIR) to the one that the server serves"
        )
    return manifest


def _described(model: ModelConfig, told: Told) -> ModelManifest:
    """Without a manifest file: from the folder itself, or from what the settings state."""
    if model.engine == "embedded":
        manifest = describe_folder(folder_of(model), model.name, engine=EMBEDDED, told=told)
        _check_kind(model, manifest)
        return manifest
    arguments = {
        "model": server_model(model),
        "quantisation": model.quantisation,
        "context_tokens": str(model.context_tokens),
    }
    if model.kind != CHAT:
        arguments["kind"] = model.kind
    if model.engine == "triton":
        return describe_server(model.name, arguments, "triton")
    return describe_server(model.name, arguments)


def _check_engine(model: ModelConfig, manifest: ModelManifest) -> None:
    """The manifest's engine is of the kind that runs: the embedded one, Triton, or a server."""
    if model.engine == "embedded":
        right = manifest.engine == EMBEDDED
    elif model.engine == "triton":
        right = manifest.engine == "triton"
    else:
        right = manifest.engine not in (EMBEDDED, "triton")
    if not right:
        raise ConfigurationError(
            f"the manifest is for the engine {manifest.engine}, which is not the one that this "
            "agent is set to use"
        )
    if model.engine == "embedded":
        check_onnx({file.path: file for file in manifest.files}, folder_of(model))


def _check_stated(model: ModelConfig, manifest: ModelManifest) -> None:
    """What both the manifest and the settings state, they state alike."""
    if model.name != manifest.name:
        raise ConfigurationError(
            f"the manifest is of {manifest.name} and the settings name the model {model.name}; "
            "name it as the manifest does"
        )
    _check_kind(model, manifest)
    asked = manifest.arguments.get("model")
    if model.engine != "embedded" and asked not in (None, server_model(model, manifest)):
        raise ConfigurationError(
            f"the manifest's argument model is {asked}; served_as (COCOON_PROVIDER_BACKEND_MODEL) "
            "asks the server for another"
        )


def _check_kind(model: ModelConfig, manifest: ModelManifest) -> None:
    if "kind" in model.model_fields_set and model.kind != manifest.kind:
        raise ConfigurationError(
            f"the manifest is of a model for {manifest.kind} and the settings say that "
            f"{model.name} is for {model.kind}; leave kind out, or set it as the manifest does"
        )


def check_context(manifest: ModelManifest, context_tokens: int) -> None:
    """Raises ConfigurationError if the manifest states another context than is offered."""
    stated = manifest.arguments.get("context_tokens")
    if stated not in (None, str(context_tokens)):
        raise ConfigurationError(
            f"the manifest's argument context_tokens is {stated} and the engine is set to "
            f"{context_tokens}"
        )


def server_model(model: ModelConfig, manifest: ModelManifest | None = None) -> str:
    """The server's own name of the model."""
    if model.served_as is not None or manifest is None:
        return model.served_as or model.name
    return manifest.arguments.get("model", manifest.name)
