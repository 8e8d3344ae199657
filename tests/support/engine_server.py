"""A real OpenAI-compatible HTTP server on loopback: the embedded engine behind Starlette.

It plays vLLM and its like for the adapter's tests, and can be told to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cocoon.chat import (
    Answer,
    ChatRequest,
    CompletionAnswer,
    parse_chat_request,
    parse_completion_request,
    parse_embedding_request,
    to_json,
)
from cocoon.chat.embeddings import embedding_answer
from cocoon.kernel.errors import CocoonError
from services.provider.backends.base import Backend, Embedder, Ended, Piece


class EngineServer:
    """Serves one backend. `fault` names what goes wrong in the next answers.

    `usage` is laid over every answer's own: what a server with a cache or with thoughts tells.
    """

    def __init__(self, backend: Backend | Embedder, model: str) -> None:
        self._backend: Any = backend
        self.completes = True  # False: as servers that know conversations only
        self.usage: dict[str, Any] = {}
        self.model = model
        self.fault = ""
        self.counts_streams = True  # False: as servers that give no usage with a stream
        self.bodies: list[dict[str, Any]] = []
        self.running = 0

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _chat(self, http: Request) -> Response:
        body = await http.json()
        self.bodies.append(body)
        if self.fault.isdigit():
            error = {"message": "quotes the prompt", "code": "named_code", "param": "messages"}
            return JSONResponse({"error": error}, int(self.fault))
        if not self.completes and http.url.path == "/v1/completions":
            return JSONResponse({"detail": "Not Found"}, 404)
        limit = body["max_tokens"]
        chat = http.url.path == "/v1/chat/completions"
        request = parse_chat_request(body) if chat else parse_completion_request(body)
        generator = self._backend.generate(request, max_input_tokens=2**31, max_output_tokens=limit)
        try:
            await anext(generator)  # Started, or the refusal
        except CocoonError as error:
            return JSONResponse(error.to_openai(), error.http_status)
        answer: Answer | CompletionAnswer
        if isinstance(request, ChatRequest):
            answer = Answer("ab" * 16, 1, "fp_x", request)
        else:
            answer = CompletionAnswer("ab" * 16, 1, "fp_x", request)
        if self.fault == "late":
            await asyncio.sleep(0.5)
        if not body.get("stream"):
            return await self._unless_left(http, self._completion(generator, answer))
        return StreamingResponse(
            self._events(generator, answer),
            media_type="text/event-stream",
        )

    async def _unless_left(self, http: Request, work: Coroutine[Any, Any, Response]) -> Response:
        """As vLLM and its like: who hangs up stops the work."""
        self.running += 1
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=0.02))[0]:
                if await http.is_disconnected():
                    return Response(status_code=499)
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
            self.running -= 1

    async def _embeddings(self, http: Request) -> Response:
        body = await http.json()
        self.bodies.append(body)
        if self.fault.isdigit():
            error = {"message": "quotes the prompt", "code": "named_code", "param": "input"}
            return JSONResponse({"error": error}, int(self.fault))
        request = parse_embedding_request(body)
        try:
            made = await self._backend.embed(request, max_input_tokens=2**31)
        except CocoonError as error:
            return JSONResponse(error.to_openai(), error.http_status)
        value = embedding_answer(request, made)
        match self.fault:
            case "no_usage":
                del value["usage"]
            case "fewer":
                value["data"].pop()
            case "mixed":
                value["data"].reverse()
            case "infinite":
                value["data"][0]["embedding"][0] = 1e300
            case "shorter":
                for item in value["data"]:
                    item["embedding"].pop()
        raw = b"{not json" if self.fault == "garbage" else to_json(value)
        return Response(raw, media_type="application/json")

    async def _completion(self, generator: Any, answer: Answer | CompletionAnswer) -> Response:
        text, logprobs = "", []
        async for output in generator:
            if isinstance(output, Piece):
                text += output.text
                logprobs += output.logprobs
            elif isinstance(output, Ended):
                value = answer.completion(text, output.reason, output.usage, logprobs)
                value["usage"] |= self.usage
        if self.fault == "no_usage":
            del value["usage"]
        body = b"{not json" if self.fault == "garbage" else to_json(value)
        return Response(body, media_type="application/json")

    async def _events(
        self, generator: Any, answer: Answer | CompletionAnswer
    ) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            if (opening := answer.opening()) is not None:
                yield _event(opening)
            async for output in generator:
                if self.fault == "cut":
                    return
                if self.fault == "garbage":
                    yield b"data: {not json\n\n"
                if isinstance(output, Piece):
                    yield _event(answer.delta_chunk(output.text, output.logprobs))
                elif isinstance(output, Ended):
                    yield _event(answer.final_chunk(output.reason))
                    if self.counts_streams and self.fault != "no_usage":
                        chunk = answer.usage_chunk(output.usage)
                        yield _event({**chunk, "usage": {**chunk["usage"], **self.usage}})
            yield b"data: [DONE]\n\n"
        finally:
            self.running -= 1
            await generator.aclose()

    @contextlib.asynccontextmanager
    async def serve(self, port: int = 0, **tls: Any) -> AsyncIterator[str]:
        """Run on a port, or one that the system gives; yields the base URL.

        `tls` is uvicorn's ssl_*.
        """
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._chat, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, log_config=None, lifespan="off", **tls
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        bound = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{bound}"
        finally:
            server.should_exit = True
            await task


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
