"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, Ollama.

Only who streams is asked for a stream: one body is cheaper for both, and nothing of it is delivered
before its end. Token counts are the server's own: one that gives none with a stream
(llama-cpp-python's) is always asked for one body.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

from cocoon.chat import (
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINT,
    MAX_REQUEST_TOKENS,
    Capabilities,
    ChatRequest,
    Embedded,
    EmbeddingRequest,
    TextRequest,
)
from cocoon.chat.embeddings import FLOAT_BYTES
from cocoon.kernel.errors import RateLimited, Unavailable
from services.provider.backends.base import (
    Ended,
    Output,
    Started,
    inputs_too_long,
    no_completions,
    prompt_too_long,
)
from services.provider.backends.openai_answers import (
    StreamReader,
    failed,
    read_embeddings,
    read_whole,
)
from services.provider.backends.openai_server import (
    BROKEN,
    NOT_SERVED,
    OpenAIServer,
    broke,
    refusal,
    whole_body,
)

_STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}
_PASSED_ON: Final = (
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "seed",
    "stop", "temperature", "top_p",
)  # fmt: skip


class OpenAICompatibleBackend:
    """Serves one model of a running server over its chat completions and completions.

    ca_file: what its certificate is checked against, beside the system's. client_cert: the agent's
    own certificate and key, for a server that asks for one.
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
        read_timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        api_key: str | None = None,
        ca_file: Path | None = None,
        client_cert: tuple[Path, Path] | None = None,
    ) -> None:
        self._server = OpenAIServer(
            url, model, connections=queue_limit, read_timeout_s=read_timeout_s,
            deadline_s=deadline_s, api_key=api_key, ca_file=ca_file, client_cert=client_cert,
        )  # fmt: skip
        self._queue_limit = queue_limit
        self._running = 0
        self._counts_streams = True  # found out by `start`
        self.capabilities = capabilities
        self.context_tokens = self.request_tokens = context_tokens
        self.system_fingerprint = self._server.fingerprint

    async def start(self) -> None:
        """Check that the model is served, and by one token whether streams come with counts."""
        await self._server.check_served()
        message = {"role": "user", "content": "hi"}
        probe = {
            "model": self._server.model, "messages": [message], "max_tokens": 1, **_STREAMED,
        }  # fmt: skip
        try:
            async with self._server.post(ENDPOINT, probe, stream=True) as answer:
                if answer.status != 200:
                    raise await refusal(answer)
                self._counts_streams = await _counts(answer)
        except BROKEN as error:
            raise broke(error) from None

    async def healthy(self) -> bool:
        """Whether the server lists the model."""
        return await self._server.healthy()

    async def close(self) -> None:
        await self._server.close()

    async def generate(
        self, request: TextRequest, *, max_input_tokens: int, max_output_tokens: int
    ) -> AsyncGenerator[Output, None]:
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        stream = bool(request.stream) and self._counts_streams
        completions = not isinstance(request, ChatRequest)
        body = self._body(request, max_output_tokens)
        bounds = max_input_tokens, max_output_tokens
        try:
            async with self._server.post(
                COMPLETIONS if completions else ENDPOINT,
                {**body, **_STREAMED} if stream else body, stream=stream,
            ) as answer:  # fmt: skip
                if completions and answer.status in NOT_SERVED:
                    raise no_completions()
                if answer.status != 200:
                    raise await refusal(answer)
                if not stream:
                    piece, end = read_whole(await whole_body(answer), completions=completions)
                    self._check_bounds(request, end, *bounds)
                    for output in (Started(end.usage.prompt), piece, end):
                        if output is not None:
                            yield output
                    return
                yield Started(None)
                reader = StreamReader(completions=completions)
                async for data in answer.content.iter_any():  # to its end: then it is used again
                    for output in reader.feed(data):
                        if isinstance(output, Ended):
                            self._check_bounds(request, output, *bounds)
                        yield output
                if not reader.done:
                    raise failed("The engine's server broke off.")
        except BROKEN as error:
            raise broke(error) from None
        finally:
            self._running -= 1

    def _check_bounds(
        self, request: TextRequest, end: Ended, max_input_tokens: int, max_output_tokens: int
    ) -> None:
        """Counts come last, so an answer over the bounds is refused at its end."""
        if end.usage.prompt > max_input_tokens:
            raise prompt_too_long(
                request, max_input_tokens, tokens=end.usage.prompt,
                context_tokens=self.context_tokens, max_output_tokens=max_output_tokens,
            )  # fmt: skip
        if end.usage.completion > max_output_tokens:
            raise failed("The engine's server gave more than was asked.")

    def _body(self, request: TextRequest, max_output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            name: value
            for name in _PASSED_ON
            if (value := getattr(request, name, None)) is not None
        }
        body["model"] = self._server.model
        if not isinstance(request, ChatRequest):
            return {**body, "prompt": request.prompt, "max_tokens": max_output_tokens}
        body["messages"] = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in request.messages
        ]
        if request.response_format is not None:
            body["response_format"] = request.response_format.model_dump(exclude_none=True)
        body["max_tokens"] = max_output_tokens
        return body


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


class OpenAICompatibleEmbedder:
    """Serves one model of a running server over its embeddings.

    Its counts are the server's. `context_tokens` is stated by the operator: a server that cuts long
    inputs short instead of refusing them is not noticed here.
    """

    kind: Literal["embeddings"] = "embeddings"
    capabilities = Capabilities()

    def __init__(
        self,
        url: str,
        model: str,
        *,
        context_tokens: int,
        queue_limit: int,
        read_timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        api_key: str | None = None,
        ca_file: Path | None = None,
        client_cert: tuple[Path, Path] | None = None,
    ) -> None:
        self._server = OpenAIServer(
            url, model, connections=queue_limit, read_timeout_s=read_timeout_s,
            deadline_s=deadline_s, api_key=api_key, ca_file=ca_file, client_cert=client_cert,
        )  # fmt: skip
        self._queue_limit = queue_limit
        self._running = 0
        self.context_tokens = context_tokens
        self.request_tokens = max(MAX_REQUEST_TOKENS, context_tokens)
        self.dimensions = 0  # found out by `start`
        self.system_fingerprint = self._server.fingerprint

    async def start(self) -> None:
        """Check that the model is served, and by one text how many numbers a vector has."""
        await self._server.check_served()
        made = await self._ask(("hi",))
        self.dimensions = len(made.vectors[0]) // FLOAT_BYTES

    async def healthy(self) -> bool:
        """Whether the server lists the model."""
        return await self._server.healthy()

    async def close(self) -> None:
        await self._server.close()

    async def embed(self, request: EmbeddingRequest, *, max_input_tokens: int) -> Embedded:
        if self._running >= self._queue_limit:
            raise RateLimited("The engine is answering as many requests as it can.", code="busy")
        self._running += 1
        try:
            made = await self._ask(request.texts)
        finally:
            self._running -= 1
        if made.usage.prompt > max_input_tokens:
            raise inputs_too_long(made.usage.prompt, max_input_tokens)
        if len(made.vectors[0]) != self.dimensions * FLOAT_BYTES:
            raise failed("The engine's server gave vectors of another length than before.")
        return made

    async def _ask(self, texts: tuple[str, ...]) -> Embedded:
        # as numbers: there are servers that know no base64, and JSON keeps a float32 exactly
        body = {"model": self._server.model, "input": list(texts), "encoding_format": "float"}
        try:
            async with self._server.post(EMBEDDINGS, body) as answer:
                if answer.status in NOT_SERVED:
                    raise failed("The engine's server serves no embeddings with this model.")
                if answer.status != 200:
                    raise await refusal(answer)
                return read_embeddings(await whole_body(answer), len(texts))
        except BROKEN as error:
            raise broke(error) from None
