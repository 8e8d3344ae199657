"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, Ollama.

Only loopback or https addresses are taken: the prompt is in the clear on that way, so it stays in
the machine (or goes to a peer that proves its name). Token counts are the server's own: one that
gives none with a stream (llama-cpp-python's) is asked for whole answers instead.
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
MAX_WHOLE_BYTES: Final = 64 * 1024 * 1024
_PATH: Final = "/v1/chat/completions"
_STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}
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
        self._streams = True  # found out by `start`
        self.capabilities = capabilities
        self.context_tokens = context_tokens
        self.system_fingerprint = f"fp_{hashlib.sha256(model.encode()).hexdigest()[:12]}"

    async def start(self) -> None:
        """Check that the model is served, and by one token whether streams come with counts."""
        if not await self.healthy():
            raise Unavailable(
                "the engine's server does not answer or does not serve the model; start it first"
            )
        message = {"role": "user", "content": "hi"}
        probe = {"model": self._model, "messages": [message], "max_tokens": 1, **_STREAMED}
        try:
            async with self._client.stream("POST", _PATH, json=probe) as answer:
                if answer.status_code != 200:
                    raise await _refusal(answer)
                items = [item async for item in _lines(answer)]
                self._streams = any(item.get("usage") for item in items if item is not None)
        except httpx.HTTPError as error:
            raise _broke(error) from None

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
        answering = self._stream if self._streams else self._whole
        outputs = answering(self._body(request, max_output_tokens))
        try:
            async for output in _bounded(outputs, max_input_tokens, max_output_tokens):
                yield output
        except httpx.HTTPError as error:
            raise _broke(error) from None
        finally:
            await outputs.aclose()
            self._running -= 1

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[Output, None]:
        async with self._client.stream("POST", _PATH, json={**body, **_STREAMED}) as answer:
            if answer.status_code != 200:
                raise await _refusal(answer)
            yield Started(None)
            reason: Any = None
            usage: Any = None
            async for item in _lines(answer):
                if item is None:
                    yield _ended(reason, usage)
                    continue
                if "error" in item:
                    raise _failed("The engine's server failed.")
                usage = item.get("usage") or usage
                for choice in item.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    piece = _piece(choice, "delta")
                    if piece is not None:
                        yield piece

    async def _whole(self, body: dict[str, Any]) -> AsyncGenerator[Output, None]:
        async with self._client.stream("POST", _PATH, json=body) as answer:
            if answer.status_code != 200:
                raise await _refusal(answer)
            raw = b""
            async for chunk in answer.aiter_bytes():
                raw += chunk
                if len(raw) > MAX_WHOLE_BYTES:
                    raise _failed("The engine's server sent an answer that is too long.")
        try:
            value = json.loads(raw)
            choice, usage = value["choices"][0], value["usage"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _failed("The engine's server sent what is not an answer.") from None
        ended = _ended(choice.get("finish_reason"), usage)
        yield Started(ended.usage.prompt)
        piece = _piece(choice, "message", ended.usage.completion)
        if piece is not None:
            yield piece
        yield ended

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
            raise _failed("The engine's server sent a line that is too long.")
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
                raise _failed("The engine's server sent what is not JSON.") from None
            if isinstance(item, dict):
                yield item
    if not done:
        raise _failed("The engine's server broke off.")


async def _bounded(
    outputs: AsyncIterator[Output], max_input_tokens: int, max_output_tokens: int
) -> AsyncIterator[Output]:
    """Pass outputs on. Counts come last, so an answer over the bounds is refused at its end."""
    async for output in outputs:
        if isinstance(output, Ended):
            if output.usage.prompt > max_input_tokens:
                raise prompt_too_long(output.usage.prompt, max_input_tokens)
            if output.usage.completion > max_output_tokens:
                raise _failed("The engine's server gave more than was asked.")
        yield output


def _ended(reason: Any, usage: Any) -> Ended:
    if reason not in ("stop", "length") or not isinstance(usage, dict):
        raise _failed("The engine's server ended without a reason or token counts.")
    try:
        return Ended(reason, _usage(usage))
    except (KeyError, ValueError, TypeError):
        raise _failed("The engine's server gave token counts that are none.") from None


def _piece(choice: dict[str, Any], where: str, tokens: int = 1) -> Piece | None:
    text = (choice.get(where) or {}).get("content") or ""
    found = ((choice.get("logprobs") or {}).get("content")) or ()
    logprobs = tuple(_logprob(entry) for entry in found)
    if not text and not logprobs:
        return None
    return Piece(text, len(logprobs) or tokens, logprobs)


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
    return _failed(f"The engine's server answered {answer.status_code}.")


def _failed(message: str) -> Unavailable:
    return Unavailable(message, code="engine_failed")


def _broke(error: httpx.HTTPError) -> Unavailable:
    return _failed(f"The engine's server failed ({type(error).__name__}).")


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
