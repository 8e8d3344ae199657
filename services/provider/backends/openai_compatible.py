"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, Ollama.

Only loopback or https addresses are taken: the prompt is in the clear on that way, so it stays in
the machine (or goes to a peer that proves its name). Token counts are the server's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from cocoon.chat import Capabilities, ChatRequest, TokenLogprob, TokenUsage
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    RateLimited,
    Unavailable,
)
from services.provider.backends.base import Ended, Output, Piece, Started, prompt_too_long

MAX_LINE_BYTES: Final = 1024 * 1024
MAX_ERROR_BYTES: Final = 64 * 1024
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_PASSED_ON: Final = (
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "seed",
    "stop", "temperature", "top_p",
)  # fmt: skip


def check_url(url: str) -> str:
    """Return the server's base address without a slash. Raises ConfigurationError."""
    parts = urlsplit(url)
    near = parts.scheme == "http" and parts.hostname in _LOOPBACK
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
        api_key: str | None = None,
    ) -> None:
        base = check_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=base,
            headers=headers,
            timeout=httpx.Timeout(read_timeout_s, connect=5.0),
            limits=httpx.Limits(max_connections=queue_limit, max_keepalive_connections=queue_limit),
            trust_env=False,
            follow_redirects=False,
        )
        self._model = model
        self._queue_limit = queue_limit
        self._running = 0
        self.capabilities = capabilities
        self.context_tokens = context_tokens
        self.system_fingerprint = f"fp_{hashlib.sha256(model.encode()).hexdigest()[:12]}"

    async def start(self) -> None:
        if not await self.healthy():
            raise Unavailable(
                "the engine's server does not answer or does not serve the model; start it first"
            )

    async def healthy(self) -> bool:
        """Whether the server lists the model."""
        try:
            answer = await self._client.get("/v1/models", timeout=5.0)
            return answer.status_code == 200 and any(
                item.get("id") == self._model for item in answer.json()["data"]
            )
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return False

    async def close(self) -> None:
        await self._client.aclose()

    async def generate(
        self, request: ChatRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        try:
            body = self._body(request, max_output_tokens)
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise await _refusal(answer)
                yield Started(None)
                async for output in _read(_lines(answer), max_input_tokens, max_output_tokens):
                    yield output
        except httpx.HTTPError as error:
            raise Unavailable(
                f"The engine's server failed ({type(error).__name__}).", code="engine_failed"
            ) from None
        finally:
            self._running -= 1

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
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        return body


async def _lines(answer: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The stream's JSON objects, None at [DONE], then nothing more than the body's end.

    Reading on to the end lets the connection be used again.
    """
    pending = b""
    done = False
    async for chunk in answer.aiter_bytes():
        pending += chunk
        *whole, pending = pending.split(b"\n")
        if len(pending) > MAX_LINE_BYTES:
            raise Unavailable(
                "The engine's server sent a line that is too long.", code="engine_failed"
            )
        for line in whole:
            name, _, value = line.strip().partition(b":")
            if name != b"data":
                continue
            if done:
                continue
            if value.strip() == b"[DONE]":
                done = True
                yield None
                continue
            try:
                item = json.loads(value)
            except ValueError:
                raise Unavailable(
                    "The engine's server sent what is not JSON.", code="engine_failed"
                ) from None
            if isinstance(item, dict):
                yield item
    if not done:
        raise Unavailable("The engine's server broke off.", code="engine_failed")


async def _read(
    objects: AsyncIterator[dict[str, Any] | None], max_input_tokens: int, max_output_tokens: int
) -> AsyncIterator[Output]:
    reason: Any = None
    usage: TokenUsage | None = None
    async for item in objects:
        if item is None:
            yield _ended(reason, usage, max_input_tokens, max_output_tokens)
            continue
        if "error" in item:
            raise Unavailable("The engine's server failed.", code="engine_failed")
        if item.get("usage"):
            usage = _usage(item["usage"])
        for choice in item.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            piece = _piece(choice)
            if piece is not None:
                yield piece


def _ended(
    reason: Any, usage: TokenUsage | None, max_input_tokens: int, max_output_tokens: int
) -> Ended:
    """The answer's end, with counts that the job's bounds allow. Raises Unavailable or TooLarge."""
    if usage is None or reason not in ("stop", "length"):
        raise Unavailable(
            "The engine's server ended without a reason or token counts.", code="engine_failed"
        )
    if usage.prompt > max_input_tokens:
        raise prompt_too_long(usage.prompt, max_input_tokens)
    if usage.completion > max_output_tokens:
        raise Unavailable("The engine's server gave more than was asked.", code="engine_failed")
    return Ended(reason, usage)


def _piece(choice: dict[str, Any]) -> Piece | None:
    text = (choice.get("delta") or {}).get("content") or ""
    found = ((choice.get("logprobs") or {}).get("content")) or ()
    logprobs = tuple(_logprob(entry) for entry in found)
    if not text and not logprobs:
        return None
    return Piece(text, len(logprobs) or 1, logprobs)


def _logprob(entry: dict[str, Any]) -> TokenLogprob:
    raw = entry.get("bytes")
    text = str(entry["token"])
    return TokenLogprob(
        text,
        bytes(raw) if raw is not None else text.encode(),
        float(entry["logprob"]),
        tuple(_logprob(rival) for rival in entry.get("top_logprobs") or ()),
    )


def _usage(value: dict[str, Any]) -> TokenUsage:
    prompt_details = value.get("prompt_tokens_details") or {}
    details = value.get("completion_tokens_details") or {}
    prompt, completion = int(value["prompt_tokens"]), int(value["completion_tokens"])
    return TokenUsage(
        prompt=prompt,
        completion=completion,
        cached=min(int(prompt_details.get("cached_tokens") or 0), prompt),
        reasoning=min(int(details.get("reasoning_tokens") or 0), completion),
    )


async def _refusal(answer: httpx.Response) -> CocoonError:
    """A server's refusal in our own words; its text may quote the prompt and is not passed on."""
    body = b""
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    code, param = _named(body)
    if answer.status_code == 429:
        return RateLimited("The engine is answering as many requests as it can.", code="busy")
    if answer.status_code in (400, 413, 422):
        return BadRequest(
            "The model's engine refuses this request; its parameter or length does not fit.",
            code=code or "engine_refused", param=param,
        )  # fmt: skip
    return Unavailable(f"The engine's server answered {answer.status_code}.", code="engine_failed")


def _named(body: bytes) -> tuple[str | None, str | None]:
    """The code and param of an OpenAI error, if they look like names."""
    try:
        error = json.loads(body)["error"]
        found = [error.get(name) for name in ("code", "param")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, None
    code, param = (
        value if isinstance(value, str) and value.isidentifier() and len(value) <= 64 else None
        for value in found
    )
    return code, param
