"""A model's engine, made from its configuration and a manifest whose files were checked first."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from cocoon.agent.config import ModelConfig
from cocoon.bus.service import Stop
from cocoon.chat import Capabilities
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import ConfigurationError
from cocoon.models import ModelManifest
from cocoon.models.verifying import verify
from services.provider.backends.base import Backend, Embedder, EngineLoad
from services.provider.backends.making import EngineSettings, backend_for
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
    return ServedModel(model, manifest.model_id, engine, clock, load, manifest=manifest)


def make_backend(
    model: ModelConfig, manifest: ModelManifest, randomness: Randomness, load: EngineLoad,
    *, deadline_s: float,
) -> Backend | Embedder:  # fmt: skip
    """Not started yet. Raises ConfigurationError."""
    try:
        return backend_for(
            engine_settings(model, manifest, deadline_s=deadline_s), randomness=randomness,
            load=load,
        )  # fmt: skip
    except OSError as error:
        raise ConfigurationError(
            f"the files of {model.name} cannot be read ({error.strerror})"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the files of {model.name} hold what their engine cannot read ({type(error).__name__})"
        ) from None


def engine_settings(
    model: ModelConfig, manifest: ModelManifest, *, deadline_s: float
) -> EngineSettings:
    """What the engine's adapter is told. Raises ConfigurationError."""
    if model.engine == "openai" and model.metrics_url is not None:
        raise ConfigurationError(
            f'the model {model.name} has metrics_url, which only engine = "triton" uses; remove it'
        )
    return EngineSettings(
        engine=model.engine,
        kind=manifest.kind,
        folder=folder_of(model) if model.engine == "embedded" else None,
        url=model.url,
        model=server_model(model, manifest),
        context_tokens=model.context_tokens,
        capabilities=Capabilities(**dict.fromkeys(model.capabilities, True)),
        queue_limit=ENGINE_LIMIT,
        read_timeout_s=model.read_timeout_s,
        deadline_s=deadline_s,
        api_key_file=model.api_key_file,
        ca_file=model.ca_file,
        client_cert_file=model.client_cert_file,
        client_key_file=model.client_key_file,
        metrics_url=model.metrics_url,
    )
