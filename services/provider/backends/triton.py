"""A Triton Inference Server as an engine: gRPC, one decoupled stream a request.

Closing an answer cancels its stream, and a deadline travels with it, so the server stops too. Only
loopback or TLS addresses are taken, because the prompt is in the clear on that way; the ids that
the server sees are drawn for it and name no job.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import grpc
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from cocoon.chat import Capabilities, ChatRequest
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    DeadlineExceeded,
    RateLimited,
    Unavailable,
)
from services.provider.backends.base import (
    Ended,
    EngineLoad,
    Output,
    Piece,
    Started,
    prompt_too_long,
)
from services.provider.backends.openai_compatible import LOOPBACK, check_url
from services.provider.backends.triton_wire import (
    INPUTS,
    MAX_METRICS_BYTES,
    OUTPUTS,
    PROTOCOL,
    failed,
    read_error,
    read_load,
    read_outputs,
    request_text,
)

MAX_SENT_BYTES: Final = 64 * 1024 * 1024
MAX_RECEIVED_BYTES: Final = 4 * 1024 * 1024
ASK_TIMEOUT_S: Final = 5.0
END_TIMEOUT_S: Final = 1.0
_BROKEN: Final = (grpc.RpcError, grpc.aio.UsageError, InferenceServerException, OSError)


def check_address(url: str) -> tuple[str, bool]:
    """The gRPC target and whether it takes TLS. Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    whole = host and port and not (parts.username or parts.query or parts.path.strip("/"))
    near = parts.scheme == "grpc" and host in LOOPBACK
    if not whole or not (near or parts.scheme == "grpcs"):
        raise ConfigurationError(
            "a Triton server's address is grpc://HOST:PORT on loopback or grpcs://HOST:PORT: "
            "prompts travel there in the clear, and nobody on the way may read them"
        )
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}", parts.scheme == "grpcs"


class TritonBackend:
    """Serves one model of a running server. Times in seconds.

    deadline_s bounds a whole answer (DeadlineExceeded), read_timeout_s the wait for its next
    piece (Unavailable). `load` is told what the server's metrics say, if `metrics_url` is given.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        context_tokens: int,
        capabilities: Capabilities,
        queue_limit: int,
        randomness: Randomness,
        load: EngineLoad,
        metrics_url: str | None = None,
        deadline_s: float = 600.0,
        read_timeout_s: float = 120.0,
        ca_file: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self._target, self._tls = check_address(url)
        self._metrics_url = f"{check_url(metrics_url)}/metrics" if metrics_url else None
        self._model = model
        self._queue_limit = queue_limit
        self._randomness = randomness
        self._load = load
        self._deadline_s = deadline_s
        self._read_timeout_s = read_timeout_s
        self._ca_file = ca_file
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        self._client: InferenceServerClient | None = None
        self._http: aiohttp.ClientSession | None = None
        self._running = 0
        self._checked = b""  # the model's configuration that was found to fit
        self.capabilities = capabilities
        self.context_tokens = context_tokens
        self.system_fingerprint = f"fp_{hashlib.sha256(model.encode()).hexdigest()[:12]}"

    async def start(self) -> None:
        """Connect, and check that the model is served as the agent speaks to it."""
        options = [
            ("grpc.max_send_message_length", MAX_SENT_BYTES),
            ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        try:
            self._client = InferenceServerClient(
                self._target, ssl=self._tls, channel_args=options,
                root_certificates=str(self._ca_file) if self._ca_file else None,
            )  # fmt: skip
        except OSError:
            raise ConfigurationError(
                f"the certificates {self._ca_file} of the engine's server cannot be read"
            ) from None
        if self._metrics_url is not None:
            self._http = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S), trust_env=False
            )
        if not await self._ready(self._client):
            raise Unavailable(
                "the Triton server does not answer or does not serve the model; start it first"
            )
        try:
            self._checked = await self._configuration(self._client)
        except _BROKEN as error:
            raise _broke(error) from None
        self.system_fingerprint = f"fp_{hashlib.sha256(self._checked).hexdigest()[:12]}"

    async def healthy(self) -> bool:
        """Whether the server is ready, serves the model that was checked, and has room."""
        if self._client is None or not await self._ready(self._client):
            return False
        try:
            if await self._configuration(self._client) != self._checked:
                return False
        except (*_BROKEN, ConfigurationError):
            return False
        return await self._has_room()

    async def close(self) -> None:
        client, self._client = self._client, None
        http, self._http = self._http, None
        if client is not None:
            await client.close()
        if http is not None:
            await http.close()

    async def generate(
        self, request: ChatRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        if self._client is None:
            raise Unavailable("The engine has stopped.")
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        max_input_tokens = min(max_input_tokens, self.context_tokens)
        inputs = [
            _tensor("request", request_text(request)),
            _tensor("max_input_tokens", max_input_tokens),
            _tensor("max_output_tokens", min(max_output_tokens, self.context_tokens)),
        ]
        replies = self._client.stream_infer(
            _once(
                {
                    "model_name": self._model,
                    "inputs": inputs,
                    "request_id": self._randomness.token(8).hex(),
                }
            ),
            stream_timeout=self._deadline_s,
            headers=self._headers,
        )
        try:
            async for output in self._outputs(replies, max_output_tokens):
                if isinstance(output, Started) and (output.prompt_tokens or 0) > max_input_tokens:
                    raise prompt_too_long(output.prompt_tokens or 0, max_input_tokens)
                yield output
        except _BROKEN as error:
            raise _broke(error) from None
        except BadRequest as error:
            raise _with_bound(error, max_input_tokens) from None
        finally:
            replies.cancel()
            self._running -= 1

    async def _outputs(self, replies: Any, max_output_tokens: int) -> AsyncIterator[Output]:
        """The stream's outputs to the end. More than was asked for is an error, never passed on."""
        first, made = True, 0
        while True:
            for output in await self._next(replies, first=first):
                if isinstance(output, Piece):
                    made += output.tokens
                if isinstance(output, Ended):
                    made = max(made, output.usage.completion)
                if made > max_output_tokens:
                    raise failed("The engine's server gave more than was asked.")
                if isinstance(output, Ended):
                    await self._end_of(replies)
                    yield output
                    return
                yield output
            first = False

    async def _end_of(self, replies: Any) -> None:
        """Read the stream to its end: a server may break on the cancelling of what it has ended."""
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await anext(replies)
                raise failed("The engine's server went on after its end.")

    async def _next(self, replies: Any, *, first: bool) -> list[Output]:
        try:
            async with asyncio.timeout(self._read_timeout_s):
                result, error = await anext(replies)
        except TimeoutError:
            raise failed("The engine's server stopped speaking.") from None
        except StopAsyncIteration:
            raise failed("The engine's server broke off.") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # ours; otherwise the stream was cancelled by its other end or by `close`
            raise failed("The engine's server ended the answer.") from None
        if error is not None:
            raise read_error(error.message() or "")
        response = result.get_response()
        names = [tensor.name for tensor in response.outputs]
        return read_outputs(
            dict(zip(names, response.raw_output_contents, strict=False)), first=first
        )

    # ---- what the server says of itself ----

    async def _ready(self, client: InferenceServerClient) -> bool:
        limits = {"headers": self._headers, "client_timeout": ASK_TIMEOUT_S}
        try:
            return bool(
                await client.is_server_ready(**limits)
                and await client.is_model_ready(self._model, **limits)
            )
        except _BROKEN:
            return False

    async def _configuration(self, client: InferenceServerClient) -> bytes:
        """The model's metadata and configuration, checked. Raises ConfigurationError."""
        limits = {"headers": self._headers, "client_timeout": ASK_TIMEOUT_S}
        metadata = await client.get_model_metadata(self._model, **limits)
        answer = await client.get_model_config(self._model, **limits)
        config = answer.config
        told = {name: value.string_value for name, value in config.parameters.items()}
        fits = (
            {tensor.name: tensor.datatype for tensor in metadata.inputs} == INPUTS
            and {tensor.name: tensor.datatype for tensor in metadata.outputs} == OUTPUTS
            and config.model_transaction_policy.decoupled
            and told.get("cocoon_protocol") == PROTOCOL
        )
        if not fits:
            raise ConfigurationError(
                f"the Triton server's model {self._model} has other tensors than the agent speaks "
                "to; infra/triton/models/skills-1/config.pbtxt shows those that it needs"
            )
        context = told.get("context_tokens", "")
        if not context.isdecimal() or int(context) < self.context_tokens:
            raise ConfigurationError(
                f"the Triton server's model {self._model} takes {context[:12] or 'no'} tokens, "
                f"fewer than the {self.context_tokens} that the agent is to offer"
            )
        parts: tuple[bytes, ...] = tuple(
            message.SerializeToString(deterministic=True) for message in (metadata, config)
        )
        return b"".join(parts)

    async def _has_room(self) -> bool:
        """Read the server's load. One that cannot be read leaves the last one standing."""
        if self._http is None or self._metrics_url is None:
            return True
        before = self._running
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._http.get(self._metrics_url, headers=self._headers) as answer:
                raw = await _at_most(answer, MAX_METRICS_BYTES)
            load = read_load(raw, self._model)
            if answer.status == 200 and load is not None:
                self._load.told(load, own=max(before, self._running))
        return self._load.elsewhere < self._queue_limit


async def _once(inputs: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield inputs


async def _at_most(answer: aiohttp.ClientResponse, size: int) -> bytes:
    raw = b""
    async for chunk in answer.content.iter_chunked(64 * 1024):
        raw += chunk
        if len(raw) >= size:
            break
    return raw[:size]


def _tensor(name: str, value: bytes | int) -> InferInput:
    tensor = InferInput(name, [1], INPUTS[name])
    kind: Any = np.object_ if isinstance(value, bytes) else np.int32
    tensor.set_data_from_numpy(np.array([value], dtype=kind))
    return tensor


def _with_bound(error: BadRequest, bound: int) -> BadRequest:
    if error.code != "context_length_exceeded":
        return error
    return BadRequest(
        f"This request has more input tokens than the {bound} that fit; shorten the messages or "
        "raise the request's input bound.",
        param="messages", code=error.code,
    )  # fmt: skip


def _broke(error: Exception) -> CocoonError:
    """A failed call in our words: the server's own may quote what it was sent."""
    status = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("The answer took too long; ask for less.")
    name = status.name if status is not None else type(error).__name__
    return failed(f"The engine's server failed ({name}).")
