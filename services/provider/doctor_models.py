"""The doctor's checks of what is served: files against the manifest, health, a short answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from cocoon.agent.config import ModelConfig
from cocoon.chat import Capabilities, ChatRequest, parse_chat_request
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import CocoonError, ConfigurationError
from cocoon.models.describing import EMBEDDED, describe_folder
from cocoon.models.kept import load
from cocoon.models.verifying import differences
from services.provider.backends.base import Backend, Ended, EngineLoad
from services.provider.backends.onnx import OnnxBackend
from services.provider.backends.openai_compatible import OpenAICompatibleBackend
from services.provider.findings import Finding, fail, ok, warn
from services.provider.settings import SHIPPED_MODEL

RUN_S: Final = 60.0
RUN_TOKENS: Final = 16
_SHOWN: Final = 3


def files(model: ModelConfig) -> Finding:
    """Every file of the model's folder against its manifest, hashed."""
    name = f"files of {model.name}"
    if model.engine != "embedded" and model.folder is None:
        return warn(
            name, "a server holds them; nobody here looked at them",
            "name its folder and a manifest (`cocoon model add`): clients then know what answers",
        )  # fmt: skip
    folder = model.folder or SHIPPED_MODEL
    try:
        if model.manifest_file is None:
            manifest = describe_folder(folder, model.name, engine=EMBEDDED)
            return ok(name, f"{len(manifest.files)} files, model id {manifest.model_id[:16]}...")
        manifest = load(model.manifest_file)
        wrong = differences(manifest, folder)
    except ConfigurationError as error:
        return fail(name, error.message, "name the right folder, or fetch the model again")
    if wrong:
        shown = "; ".join(f"{one.path!a} {one.says}" for one in wrong[:_SHOWN])
        return fail(
            name, f"{len(wrong)} differ from the manifest: {shown}",
            "fetch the model again, or describe this one with `cocoon model add`",
        )  # fmt: skip
    return ok(name, f"{len(manifest.files)} files are the manifest's, {manifest.model_id[:16]}...")


async def engine(model: ModelConfig) -> list[Finding]:
    """Health, and one real short answer."""
    health, trial = f"engine of {model.name}", f"test run of {model.name}"
    try:
        backend = make(model)
    except (CocoonError, OSError) as error:
        told = error.message if isinstance(error, CocoonError) else "its files cannot be read"
        return [fail(health, told, "mend the model's entry in the file")]
    try:
        await asyncio.wait_for(backend.start(), RUN_S)
        if not await asyncio.wait_for(backend.healthy(), RUN_S):
            return [fail(health, "it does not say that it is ready", _REMEDY)]
        found = [ok(health, f"ready, {backend.context_tokens:,} tokens of context")]
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


def _request(model: str) -> ChatRequest:
    return parse_chat_request({
        "model": model, "messages": [{"role": "user", "content": "Count from 1 to 5"}],
        "stream": True, "temperature": 0,
    })  # fmt: skip


def make(model: ModelConfig) -> Backend:
    """The engine as the agent makes it, not started. Raises ConfigurationError."""
    if model.engine == "embedded":
        return OnnxBackend(
            model.folder or SHIPPED_MODEL, queue_limit=1, randomness=SystemRandomness()
        )
    assert model.url is not None  # noqa: S101 - the configuration was checked
    shared: dict[str, Any] = {
        "context_tokens": model.context_tokens,
        "capabilities": Capabilities(**dict.fromkeys(model.capabilities, True)),
        "queue_limit": 1, "read_timeout_s": model.read_timeout_s, "deadline_s": RUN_S,
        "api_key": _api_key(model),
    }  # fmt: skip
    name = model.served_as or model.name
    if model.engine == "openai":
        return OpenAICompatibleBackend(model.url, name, **shared)
    # gRPC costs a third of a second to load: only those who use it pay
    from services.provider.backends.triton import TritonBackend

    return TritonBackend(
        model.url, name, **shared, randomness=SystemRandomness(), load=EngineLoad(),
        metrics_url=model.metrics_url, ca_file=model.ca_file,
    )  # fmt: skip


def _api_key(model: ModelConfig) -> str | None:
    if model.api_key_file is None:
        return None
    try:
        return model.api_key_file.read_text(encoding="utf-8").strip()
    except OSError:
        raise ConfigurationError(
            f"the engine's key file {model.api_key_file} cannot be read"
        ) from None
