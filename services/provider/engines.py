"""A model's engine, made from its configuration and a manifest whose files were checked first."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from cocoon.agent.config import ModelConfig
from cocoon.bus.service import Stop
from cocoon.chat import Capabilities
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.verifying import verify
from services.provider.backends.base import Backend, EngineLoad
from services.provider.backends.onnx import OnnxBackend
from services.provider.backends.openai_compatible import OpenAICompatibleBackend
from services.provider.models import ServedModel
from services.provider.queueing import Engine
from services.provider.weights import check_context, checked_manifest, folder_of, server_model

# The queue in front of an engine bounds what it gets (queueing.py), and changes with a reload
ENGINE_LIMIT: Final = 4096


async def prepare_model(
    model: ModelConfig, stop: Stop, clock: Clock, randomness: Randomness, *, deadline_s: float
) -> ServedModel | None:
    """The model with every file checked and its engine made, not started; None if asked to end.

    Raises ConfigurationError.
    """
    manifest = await checked_manifest(model, stop)
    if manifest is None:
        return None
    load = EngineLoad()
    make = partial(make_backend, model, manifest, randomness, load, deadline_s=deadline_s)
    check = partial(verify, manifest, folder_of(model)) if model.engine == "embedded" else None
    engine = await asyncio.to_thread(
        Engine, make, model.concurrency, check, checked=model.warm
    )  # fmt: skip
    check_context(manifest, engine.backend.context_tokens)
    return ServedModel(
        model, manifest.model_id, engine, clock, load, quantisation=manifest.quantisation
    )


def make_backend(
    model: ModelConfig, manifest: ModelManifest, randomness: Randomness, load: EngineLoad,
    *, deadline_s: float,
) -> Backend:  # fmt: skip
    """Not started yet. Raises ConfigurationError."""
    if model.engine == "embedded":
        try:
            return OnnxBackend(folder_of(model), queue_limit=ENGINE_LIMIT, randomness=randomness)
        except OSError as error:
            raise ConfigurationError(
                f"the files of {model.name} cannot be read ({error.strerror})"
            ) from None
    assert model.url is not None  # noqa: S101 - the configuration was checked
    served_as = server_model(model, manifest)
    shared: dict[str, Any] = {
        "context_tokens": model.context_tokens,
        "capabilities": Capabilities(**dict.fromkeys(model.capabilities, True)),
        "queue_limit": ENGINE_LIMIT,
        "read_timeout_s": model.read_timeout_s,
        "deadline_s": deadline_s,
        "api_key": _api_key(model),
    }
    if model.engine == "openai":
        for name in ("ca_file", "metrics_url"):
            if getattr(model, name) is not None:
                raise ConfigurationError(
                    f'the model {model.name} has {name}, which only engine = "triton" uses; '
                    "remove it"
                )
        return OpenAICompatibleBackend(model.url, served_as, **shared)
    # gRPC costs a third of a second to load: only those who use it pay
    from services.provider.backends.triton import TritonBackend

    return TritonBackend(
        model.url, served_as, **shared, randomness=randomness, load=load,
        metrics_url=model.metrics_url, ca_file=model.ca_file,
    )  # fmt: skip


def _api_key(model: ModelConfig) -> str | None:
    if model.api_key_file is None:
        return None
    try:
        return model.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(
            f"the engine's key file {model.api_key_file} cannot be read"
        ) from None
