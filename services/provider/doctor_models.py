"""The doctor's checks of what is served: files against the manifest, health, a short answer."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from cocoon.agent.config import ModelConfig
from cocoon.bus.service import Stop
from cocoon.chat import ChatRequest, parse_chat_request, parse_embedding_request
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import CocoonError, ConfigurationError
from cocoon.models import ModelManifest
from services.provider.backends.base import Backend, Embedder, Ended, EngineLoad
from services.provider.engines import make_backend
from services.provider.findings import Finding, fail, ok, warn
from services.provider.weights import check_context, checked_manifest

RUN_S: Final = 60.0
RUN_TOKENS: Final = 16


async def examine(model: ModelConfig) -> list[Finding]:
    """Files, then the engine made from them, as the agent does it."""
    name, health = f"files of {model.name}", f"engine of {model.name}"
    try:
        manifest = await checked_manifest(model, Stop())
    except ConfigurationError as error:
        return [fail(name, error.message, "name the right folder, or fetch the model again")]
    assert manifest is not None  # noqa: S101 - nobody asks this process to end meanwhile
    found = [files(model, manifest)]
    try:
        backend = await asyncio.to_thread(
            make_backend, model, manifest, SystemRandomness(), EngineLoad(), deadline_s=RUN_S
        )
        check_context(manifest, backend.context_tokens)
    except CocoonError as error:
        return [*found, fail(health, error.message, "mend the model's entry in the file")]
    return [*found, *await engine(model, backend)]


def files(model: ModelConfig, manifest: ModelManifest) -> Finding:
    """What was hashed, and what was not."""
    name = f"files of {model.name}"
    told = f"model id {manifest.model_id[:16]}..."
    if not manifest.files:
        return warn(
            name, f"the server holds them and nobody here looked at them; {told}",
            "name its folder and a manifest (`./cocoon model add`): clients then know what answers",
        )  # fmt: skip
    against = "as the manifest says" if model.manifest_file else "hashed; there is no manifest file"
    return ok(name, f"{len(manifest.files)} files, {against}; {told}")


async def engine(model: ModelConfig, backend: Backend | Embedder) -> list[Finding]:
    """Health, and one real short answer."""
    health = f"engine of {model.name}"
    try:
        await asyncio.wait_for(backend.start(), RUN_S)
        if not await asyncio.wait_for(backend.healthy(), RUN_S):
            return [fail(health, "it does not say that it is ready", _REMEDY)]
        found = [ok(health, f"ready, {backend.context_tokens:,} tokens of context")]
        trial = f"test run of {model.name}"
        if backend.kind == "embeddings":
            return [*found, await _embed(trial, backend, model)]
        return [*found, await _try(trial, backend, model)]
    except CocoonError as error:
        return [fail(health, error.message, _REMEDY)]
    except TimeoutError:
        return [fail(health, f"no answer within {RUN_S:.0f} s", _REMEDY)]
    finally:
        await backend.close()


_REMEDY: Final = "start the server, and check url, served_as and api_key_file in the file"


async def _try(name: str, backend: Backend, model: ModelConfig) -> Finding:
    began_s, first_s, ended = time.monotonic(), 0.0, None
    asked = _request(model.name)
    try:
        async with asyncio.timeout(RUN_S):
            async for output in backend.generate(
                asked, max_input_tokens=backend.context_tokens - RUN_TOKENS,
                max_output_tokens=RUN_TOKENS,
            ):  # fmt: skip
                first_s = first_s or time.monotonic() - began_s
                ended = output if isinstance(output, Ended) else None
    except CocoonError as error:
        return fail(name, error.message, _REMEDY)
    except TimeoutError:
        return fail(name, f"no whole answer within {RUN_S:.0f} s", _REMEDY)
    if ended is None or ended.usage.completion == 0:
        return fail(name, "the answer has no token", "try the server itself with a chat request")
    took_s = max(time.monotonic() - began_s, 1e-6)
    return ok(
        name, f"{ended.usage.completion} tokens in {took_s * 1000:.0f} ms "
        f"({ended.usage.completion / took_s:.1f} tokens/s), the first after "
        f"{first_s * 1000:.0f} ms",
    )  # fmt: skip


async def _embed(name: str, backend: Embedder, model: ModelConfig) -> Finding:
    """One real vector."""
    asked = parse_embedding_request({"model": model.name, "input": "Count from 1 to 5"})
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(RUN_S):
            await backend.embed(asked, max_input_tokens=backend.context_tokens)
    except CocoonError as error:
        return fail(name, error.message, _REMEDY)
    except TimeoutError:
        return fail(name, f"no vector within {RUN_S:.0f} s", _REMEDY)
    took_s = time.monotonic() - began_s
    return ok(name, f"a vector of {backend.dimensions} numbers in {took_s * 1000:.0f} ms")


def _request(model: str) -> ChatRequest:
    return parse_chat_request({
        "model": model, "messages": [{"role": "user", "content": "Count from 1 to 5"}],
        "stream": True, "temperature": 0,
    })  # fmt: skip
