"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, Ollama.

Only loopback or https addresses are taken: the prompt is in the clear on that way, so it stays in
the machine (or goes to a peer that proves its name). Only who streams is asked for a stream: one
body is cheaper for both, and nothing of it is delivered before its end. Token counts are the
server's own: one that gives none with a stream (llama-cpp-python's) is always asked for one body.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from cocoon.chat import Capabilities, ChatRequest, to_json
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    RateLimited,
    Unavailable,
)
from services.provider.backends.base import Ended, Output, Started, prompt_too_long
from services.provider.backends.openai_answers import (
    StreamReader,
    failed,
    named,
    read_whole,
)

MAX_LISTED: Final = 10
MAX_ERROR_BYTES: Final = 64 * 1024
MAX_WHOLE_BYTES: Final = 64 * 1024 * 1024
CONNECT_TIMEOUT_S: Final = 5.0
HEALTH_TIMEOUT_S: Final = 5.0
KEEPALIVE_S: Final = 4.0  # less than uvicorn's 5: a connection must not close as it is used again
_STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
# TimeoutError: only aiohttp's own, for a deadline of the caller arrives here as a cancellation
_BROKEN: Final = (aiohttp.ClientError, TimeoutError, OSError)
_PASSED_ON: Final = (
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "seed",
    "stop", "temperature", "top_p",
)  # fmt: skip


def check_url(url: str) -> str:
    """Return the server's base address without a slash. Raises ConfigurationError."""
    parts = urlsplit(url)
    near = parts.scheme == "http" and parts.hostname in LOOPBACK
    if not (near or parts.scheme == "https") or not parts.hostname or parts.username:
        raise ConfigurationError(
            "an engine's address is http:// on loopback or https://: prompts travel there in the "
            "clear, and nobody on the way may read them"
        )
    return url.rstrip("/").removesuffix("/v1")


class OpenAICompatibleBackend:
    """Serves one model of a running server over its streaming chat completions."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        context_tokens: int,
        capabilities: Capabilities,
        queue_limit: int,
        read_timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        base = check_url(url)
        self._address = f"{base}/v1"  # as people write it
        self._chat_url = f"{base}/v1/chat/completions"
        self._models_url = f"{base}/v1/models"
        # compressed answers would need a bound of their own; nobody compresses on loopback
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s
        )
        self._silent = aiohttp.ClientTimeout(  # until one body comes
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=deadline_s
        )
        self._session: aiohttp.ClientSession | None = None
        self._model = model
        self._queue_limit = queue_limit
        self._running = 0
        self._counts_streams = True  # found out by `start`
        self.capabilities = capabilities
        self.context_tokens = context_tokens
        self.system_fingerprint = f"fp_{hashlib.sha256(model.encode()).hexdigest()[:12]}"

    @property
    def _http(self) -> aiohttp.ClientSession:
        """The connections, made when first asked for: they belong to the running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # one more than jobs, so that a full engine still answers the health check
                connector=aiohttp.TCPConnector(
                    limit=self._queue_limit + 1, keepalive_timeout=KEEPALIVE_S
                ),
                headers=self._headers,
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
            )
        return self._session

    def _post(
        self, body: dict[str, Any], *, stream: bool
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._http.post(
            self._chat_url, data=to_json({**body, **_STREAMED} if stream else body),
            allow_redirects=False, timeout=self._timeout if stream else self._silent,
        )  # fmt: skip

    async def start(self) -> None:
        """Check that the model is served, and by one token whether streams come with counts."""
        served = await self._served()
        if self._model not in served:
            raise Unavailable(
                f"the engine's server {self._address} answers, but does not serve the model "
                f"{self._model}; it serves {_listed(served)}"
            )
        message = {"role": "user", "content": "hi"}
        probe = {"model": self._model, "messages": [message], "max_tokens": 1}
        try:
            async with self._post(probe, stream=True) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                self._counts_streams = await _counts(answer)
        except _BROKEN as error:
            raise _broke(error) from None

    async def healthy(self) -> bool:
        """Whether the server lists the model."""
        try:
            return self._model in await self._served()
        except CocoonError:
            return False

    async def _served(self) -> list[str]:
        """The models that the server lists. Raises Unavailable naming its address and the cause."""
        try:
            async with (
                asyncio.timeout(HEALTH_TIMEOUT_S),
                self._http.get(self._models_url, allow_redirects=False) as answer,
            ):
                raw = await _whole_body(answer)
            if answer.status != 200:
                raise Unavailable(
                    f"the engine's server {self._address} answers {answer.status} when it is asked "
                    "for its models; an OpenAI-compatible server lists them at /v1/models"
                )
            return [str(item["id"]) for item in json.loads(raw)["data"]]
        except _BROKEN as error:
            raise Unavailable(
                f"the engine's server {self._address} does not answer ({_cause(error)}); "
                "start it first"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unavailable(
                f"what answers at {self._address} does not list models as an OpenAI-compatible "
                "server does; name another address"
            ) from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self, request: ChatRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        stream = bool(request.stream) and self._counts_streams
        try:
            async with self._post(self._body(request, max_output_tokens), stream=stream) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                if not stream:
                    piece, end = read_whole(await _whole_body(answer))
                    self._check_bounds(end, max_input_tokens, max_output_tokens)
                    for output in (Started(end.usage.prompt), piece, end):
                        if output is not None:
                            yield output
                    return
                yield Started(None)
                reader = StreamReader()
                async for data in answer.content.iter_any():  # to its end: then it is used again
                    for output in reader.feed(data):
                        if isinstance(output, Ended):
                            self._check_bounds(output, max_input_tokens, max_output_tokens)
                        yield output
                if not reader.done:
                    raise failed("The engine's server broke off.")
        except _BROKEN as error:
            raise _broke(error) from None
        finally:
            self._running -= 1

    def _check_bounds(self, end: Ended, max_input_tokens: int, max_output_tokens: int) -> None:
        """Counts come last, so an answer over the bounds is refused at its end."""
        if end.usage.prompt > max_input_tokens:
            raise prompt_too_long(
                max_input_tokens, tokens=end.usage.prompt, context_tokens=self.context_tokens,
                max_output_tokens=max_output_tokens,
            )  # fmt: skip
        if end.usage.completion > max_output_tokens:
            raise failed("The engine's server gave more than was asked.")

    def _body(self, request: ChatRequest, max_output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            name: value for name in _PASSED_ON if (value := getattr(request, name)) is not None
        }
        body["model"] = self._model
        body["messages"] = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in request.messages
        ]
        if request.response_format is not None:
            body["response_format"] = request.response_format.model_dump(exclude_none=True)
        body["max_tokens"] = max_output_tokens
        return body


def _cause(error: Exception) -> str:
    """Why there is no answer, in the system's words."""
    if isinstance(error, TimeoutError):
        return f"nothing within {HEALTH_TIMEOUT_S:.0f} s"
    if not isinstance(error, OSError):
        return "the connection broke"
    known = error.errno is not None and error.errno > 0  # else it is the resolver's
    return (os.strerror(error.errno or 0) if known else str(error.strerror)).lower()


def _listed(names: list[str]) -> str:
    """Some of a server's models, as far as a terminal can show them."""
    shown = ["".join(filter(str.isprintable, name))[:80] for name in names[:MAX_LISTED]]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or "none"


async def _whole_body(answer: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > MAX_WHOLE_BYTES:
            raise failed("The engine's server sent an answer that is too long.")
    return bytes(raw)


async def _counts(answer: aiohttp.ClientResponse) -> bool:
    """Whether a stream comes with its token counts. Raises Unavailable if it is none."""
    reader = StreamReader()
    try:
        async for data in answer.content.iter_any():
            reader.feed(data)
    except Unavailable:
        if not reader.done:
            raise
    if not reader.done:
        raise failed("The engine's server broke off.")
    return reader.counted


async def _refusal(answer: aiohttp.ClientResponse) -> CocoonError:
    """A server's refusal in our own words; its text may quote the prompt and is not passed on."""
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    code, param = named(body)
    if answer.status == 429:
        return RateLimited("The engine is answering as many requests as it can.", code="busy")
    if answer.status in (400, 413, 422):
        return BadRequest(
            "The model's engine refuses this request; its parameter or length does not fit.",
            code=code or "engine_refused", param=param,
        )  # fmt: skip
    return failed(f"The engine's server answered {answer.status}.")


def _broke(error: Exception) -> Unavailable:
    return failed(f"The engine's server failed ({type(error).__name__}).")
