"""What this agent serves: its manifest, every file checked against it before an engine loads.

The engine is made only from a manifest that came out of here.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from cocoon.bus.service import Stop
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.describing import EMBEDDED, check_onnx, describe_folder
from cocoon.models.folder import Told
from cocoon.models.kept import load
from cocoon.models.manifest import CHAT, describe_server
from cocoon.models.verifying import verify
from cocoon.telemetry.logs import get_logger
from services.provider.settings import ProviderSettings

_log = get_logger("services.provider.weights")
PROGRESS_S: Final = 2.0  # large files take minutes; a line so often says how far it is


class _LeftOffError(Exception):
    """The process was asked to end while its files were hashed."""


async def checked_manifest(settings: ProviderSettings, stop: Stop) -> ModelManifest | None:
    """The manifest, its files hashed in a thread; None if the process is to end meanwhile.

    Raises ConfigurationError for files that are not the manifest's, or a manifest that is not of
    what this agent is set to serve.
    """
    ending = asyncio.create_task(stop.wait())
    told = _progress(ending)
    try:
        return await asyncio.to_thread(_manifest, settings, told)
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


def _manifest(settings: ProviderSettings, told: Told) -> ModelManifest:
    if settings.model_manifest_file is None:
        try:
            return _described(settings, told)
        except ValidationError as error:
            names = ", ".join(str(one["loc"][0]) for one in error.errors() if one["loc"])
            raise ConfigurationError(
                f"the model's settings or its config.json hold what no manifest takes: {names}"
            ) from None
    manifest = load(settings.model_manifest_file)
    _check_engine(settings, manifest)
    _check_stated(settings, manifest)
    # A manifest may name no file, for a model whose weights its operator does not have
    if settings.backend_url is None or "model_dir" in settings.model_fields_set:
        verify(manifest, settings.model_dir, told)
        _log.info("model_verified", model_id=manifest.model_id, size_bytes=manifest.size_bytes)
    elif manifest.files:
        raise ConfigurationError(
            f"{settings.model_manifest_file} names files and nobody looked at them; give "
            "COCOON_PROVIDER_MODEL_DIR, the folder that the server serves"
        )
    return manifest


def _described(settings: ProviderSettings, told: Told) -> ModelManifest:
    """Without a manifest file: from the folder itself, or from what the settings state."""
    if settings.backend_url is None:
        return describe_folder(settings.model_dir, settings.model_name, engine=EMBEDDED, told=told)
    if "model_dir" in settings.model_fields_set:
        raise ConfigurationError(
            "COCOON_PROVIDER_MODEL_DIR is hashed for a server's model only against a manifest; "
            "make one with `./cocoon model add` and give COCOON_PROVIDER_MODEL_MANIFEST_FILE"
        )
    arguments = {
        "model": server_model(settings),
        "quantisation": settings.backend_quantisation,
        "context_tokens": str(settings.backend_context_tokens),
    }
    if settings.model_kind != CHAT:
        arguments["kind"] = settings.model_kind
    if is_grpc(settings):
        return describe_server(settings.model_name, arguments, "triton")
    return describe_server(settings.model_name, arguments)


def _check_engine(settings: ProviderSettings, manifest: ModelManifest) -> None:
    """The manifest's engine is of the kind that runs: the embedded one, Triton, or a server."""
    if settings.backend_url is None:
        right = manifest.engine == EMBEDDED
    elif is_grpc(settings):
        right = manifest.engine == "triton"
    else:
        right = manifest.engine not in (EMBEDDED, "triton")
    if not right:
        raise ConfigurationError(
            f"the manifest is for the engine {manifest.engine}, which is not the one that this "
            "agent is set to use"
        )
    if settings.backend_url is None:
        check_onnx({file.path: file for file in manifest.files}, settings.model_dir)


def _check_stated(settings: ProviderSettings, manifest: ModelManifest) -> None:
    """What both the manifest and the settings state, they state alike."""
    if "model_name" in settings.model_fields_set and settings.model_name != manifest.name:
        raise ConfigurationError(
            f"the manifest is of {manifest.name} and COCOON_PROVIDER_MODEL_NAME says "
            f"{settings.model_name}; leave the setting out"
        )
    if "model_kind" in settings.model_fields_set and settings.model_kind != manifest.kind:
        raise ConfigurationError(
            f"the manifest is of a model for {manifest.kind} and COCOON_PROVIDER_MODEL_KIND says "
            f"{settings.model_kind}; leave the setting out"
        )
    asked = manifest.arguments.get("model")
    if settings.backend_url is not None and asked not in (None, server_model(settings, manifest)):
        raise ConfigurationError(
            f"the manifest's argument model is {asked}; COCOON_PROVIDER_BACKEND_MODEL asks the "
            "server for another"
        )


def check_context(manifest: ModelManifest, context_tokens: int) -> None:
    """Raises ConfigurationError if the manifest states another context than is offered."""
    stated = manifest.arguments.get("context_tokens")
    if stated not in (None, str(context_tokens)):
        raise ConfigurationError(
            f"the manifest's argument context_tokens is {stated} and the engine is set to "
            f"{context_tokens}"
        )


def server_model(settings: ProviderSettings, manifest: ModelManifest | None = None) -> str:
    """The server's own name of the model."""
    if settings.backend_model is not None or manifest is None:
        return settings.backend_model or settings.model_name
    return manifest.arguments.get("model", manifest.name)


def is_grpc(settings: ProviderSettings) -> bool:
    """Whether the server is a Triton."""
    return urlsplit(settings.backend_url or "").scheme in ("grpc", "grpcs")
