"""A Triton Inference Server as an engine: gRPC, one decoupled stream a request.

Closing an answer stops it in the server, and a deadline travels with it. Only loopback or TLS
addresses are taken, because the prompt is in the clear on that way; the ids that the server sees
are drawn for it and name no job.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from cocoon.chat import Capabilities, ChatRequest, TextRequest
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import (
    BadRequest,
    ConfigurationError,
    RateLimited,
    Unavailable,
)
from services.provider.backends.base import (
    PROMPT_TOO_LONG,
    Ended,
    EngineLoad,
    Output,
    Piece,
    Started,
    no_completions,
    prompt_too_long,
)
from services.provider.backends.openai_server import LOOPBACK, check_url
from services.provider.backends.triton_stream import BROKEN, TritonStream, broke
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
    stop_text,
)

MAX_SENT_BYTES: Final = 64 * 1024 * 1024
MAX_RECEIVED_BYTES: Final = 4 * 1024 * 1024
ASK_TIMEOUT_S: Final = 5.0


def check_address(url: str) -> tuple[str, bool]:
    """The gRPC target and whether it takes TLS. Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
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
    `client_cert` proves the agent to a server that asks for it: its certificate and key, PEM.
    """

    kind: Literal["chat"] = "chat"

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
        client_cert: tuple[Path, Path] | None = None,
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
        self._client_cert = client_cert
        if client_cert is not None and not self._tls:
            raise ConfigurationError("a client certificate is shown over grpcs:// only")
        self._completions = False  # told by the model's configuration
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else None
        self._client: InferenceServerClient | None = None
        self._http: aiohttp.ClientSession | None = None
        self._streams: set[TritonStream] = set()  # until their ends
        self._ending: set[asyncio.Task[None]] = set()
        self._checked = b""  # the model's configuration that was found to fit
        self.capabilities = capabilities
        self.context_tokens = self.request_tokens = context_tokens
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
                certificate_chain=str(self._client_cert[0]) if self._client_cert else None,
                private_key=str(self._client_cert[1]) if self._client_cert else None,
            )  # fmt: skip
        except OSError as error:
            raise ConfigurationError(
                f"the certificates for the engine's server cannot be read ({error.filename})"
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
        except BROKEN as error:
            raise broke(error) from None
        self.system_fingerprint = f"fp_{hashlib.sha256(self._checked).hexdigest()[:12]}"

    async def healthy(self) -> bool:
        """Whether the server is ready, serves the model that was checked, and has room."""
        if self._client is None or not await self._ready(self._client):
            return False
        try:
            if await self._configuration(self._client) != self._checked:
                return False
        except (*BROKEN, ConfigurationError):
            return False
        return await self._has_room()

    async def close(self) -> None:
        client, self._client = self._client, None
        http, self._http = self._http, None
        await asyncio.gather(*(self._end(stream, whole=False) for stream in list(self._streams)))
        if client is not None:
            await client.close()
        if http is not None:
            await http.close()
        self._load.closed()

    async def generate(
        self, request: TextRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        if len(self._streams) >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        if not (self._completions or isinstance(request, ChatRequest)):
            raise no_completions()
        max_input_tokens = min(max_input_tokens, self.context_tokens)
        stream = self._open(
            request_text(request), max_input_tokens, min(max_output_tokens, self.context_tokens)
        )
        whole = False
        too_long = partial(
            prompt_too_long, request, max_input_tokens, context_tokens=self.context_tokens,
            max_output_tokens=max_output_tokens,
        )  # fmt: skip
        try:
            async for output in _bounded(stream, max_output_tokens):
                if isinstance(output, Started) and (output.prompt_tokens or 0) > max_input_tokens:
                    raise too_long(tokens=output.prompt_tokens)
                whole = isinstance(output, Ended)
                yield output
        except BadRequest as error:
            whole = True  # the server has ended it
            raise (too_long() if error.code == PROMPT_TOO_LONG else error) from None
        finally:
            # in a task of its own: whoever is cancelled a second time here must not cut the stream
            ending = asyncio.create_task(self._end(stream, whole=whole))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.shield(ending)

    def _open(self, text: bytes, max_input_tokens: int, max_output_tokens: int) -> TritonStream:
        if self._client is None:
            raise Unavailable("The engine has stopped.")
        name = self._randomness.token(8).hex()
        stream = TritonStream(
            self._client,
            self._asking(name, text, max_input_tokens, max_output_tokens),
            self._asking(self._randomness.token(8).hex(), stop_text(name), 0, 0),
            deadline_s=self._deadline_s,
            read_timeout_s=self._read_timeout_s,
            headers=self._headers,
        )
        self._streams.add(stream)
        return stream

    def _asking(self, name: str, text: bytes, max_input: int, max_output: int) -> dict[str, Any]:
        inputs = [
            _tensor("request", text),
            _tensor("max_input_tokens", max_input),
            _tensor("max_output_tokens", max_output),
        ]
        return {"model_name": self._model, "inputs": inputs, "request_id": name}

    async def _end(self, stream: TritonStream, *, whole: bool) -> None:
        try:
            await stream.end(whole=whole)
        finally:
            self._streams.discard(stream)

    # ---- what the server says of itself ----

    async def _ready(self, client: InferenceServerClient) -> bool:
        limits = {"headers": self._headers, "client_timeout": ASK_TIMEOUT_S}
        try:
            return bool(
                await client.is_server_ready(**limits)
                and await client.is_model_ready(self._model, **limits)
            )
        except BROKEN:
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
        self._completions = told.get("cocoon_completions") == "1"
        parts: tuple[bytes, ...] = tuple(
            message.SerializeToString(deterministic=True) for message in (metadata, config)
        )
        return b"".join(parts)

    async def _has_room(self) -> bool:
        """Read the server's load. One that cannot be read leaves the last one standing."""
        if self._http is None or self._metrics_url is None:
            return True
        before = len(self._streams)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._http.get(self._metrics_url, headers=self._headers) as answer:
                raw = await _at_most(answer, MAX_METRICS_BYTES)
            load = read_load(raw, self._model)
            if answer.status == 200 and load is not None and self._http is not None:
                self._load.told(load, own=max(before, len(self._streams)))
        return self._load.elsewhere < self._queue_limit


async def _bounded(stream: TritonStream, max_output_tokens: int) -> AsyncIterator[Output]:
    """The stream's outputs to the end. More than was asked for is an error, never passed on."""
    first, made = True, 0
    while True:
        result, error = await stream.reply()
        if error is not None:
            raise read_error(error.message() or "")
        response = result.get_response()
        names = [tensor.name for tensor in response.outputs]
        tensors = dict(zip(names, response.raw_output_contents, strict=False))
        for output in read_outputs(tensors, first=first):
            if isinstance(output, Piece):
                made += output.tokens
            if isinstance(output, Ended):
                made = max(made, output.usage.completion)
            if made > max_output_tokens:
                raise failed("The engine's server gave more than was asked.")
            yield output
            if isinstance(output, Ended):
                return
        first = False


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
