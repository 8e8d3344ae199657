"""The four ways of the stock OpenAI clients into a network, behind one small face.

Synchronous and asynchronous, through a sidecar over HTTP and in this process over a sealed
transport; each runs the stock SDK and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cocoon.client import NetworkOptions, async_openai_client, openai_client

NAMES = ("sync sidecar", "async sidecar", "sync in-process", "async in-process")


@dataclass
class Way:
    """One client. Every method runs to its end and raises what the SDK raises."""

    name: str
    client: openai.OpenAI | openai.AsyncOpenAI
    runner: asyncio.Runner

    def complete(self, **request: Any) -> ChatCompletion:
        found: ChatCompletion = self._run(self.client.chat.completions.create(**request))
        return found

    def stream(self, **request: Any) -> list[ChatCompletionChunk]:
        """All chunks of a streamed answer."""
        if isinstance(self.client, openai.OpenAI):
            return list(self.client.chat.completions.create(stream=True, **request))
        client = self.client

        async def collect() -> list[ChatCompletionChunk]:
            chunks = await client.chat.completions.create(stream=True, **request)
            return [chunk async for chunk in chunks]

        return self.runner.run(collect())

    def continue_text(self, **request: Any) -> Completion:
        found: Completion = self._run(self.client.completions.create(**request))
        return found

    def stream_text(self, **request: Any) -> list[Completion]:
        """All chunks of a streamed completion."""
        if isinstance(self.client, openai.OpenAI):
            return list(self.client.completions.create(stream=True, **request))
        client = self.client

        async def collect() -> list[Completion]:
            chunks = await client.completions.create(stream=True, **request)
            return [chunk async for chunk in chunks]

        return self.runner.run(collect())

    def embed(self, **request: Any) -> CreateEmbeddingResponse:
        found: CreateEmbeddingResponse = self._run(self.client.embeddings.create(**request))
        return found

    def raw(self, **request: Any) -> tuple[Mapping[str, str], bytes]:
        """The headers and body bytes of an answer, as they come."""
        if isinstance(self.client, openai.OpenAI):
            with self.client.chat.completions.with_streaming_response.create(**request) as answer:
                return answer.headers, answer.read()
        client = self.client

        async def read() -> tuple[Mapping[str, str], bytes]:
            async with client.chat.completions.with_streaming_response.create(**request) as answer:
                return answer.headers, await answer.read()

        return self.runner.run(read())

    def models(self) -> list[Model]:
        found: list[Model] = self._run(self.client.models.list()).data
        return found

    def model(self, name: str) -> Model:
        found: Model = self._run(self.client.models.retrieve(name))
        return found

    def _run(self, result: Any) -> Any:
        if isinstance(self.client, openai.OpenAI):
            return result

        async def wait() -> Any:
            return await result

        return self.runner.run(wait())


@contextmanager
def way(name: str, sidecar: str, options: NetworkOptions, **more: Any) -> Iterator[Way]:
    """Open one of NAMES. `sidecar` is a base URL; `more` goes to the client's constructor."""
    more = {"max_retries": 0, "timeout": 60, **more}
    with asyncio.Runner() as runner:
        client: openai.OpenAI | openai.AsyncOpenAI
        if name == "sync sidecar":
            client = openai.OpenAI(base_url=sidecar, api_key="any", **more)
        elif name == "sync in-process":
            client = openai_client(options, **more)
        elif name == "async sidecar":
            client = openai.AsyncOpenAI(base_url=sidecar, api_key="any", **more)
        else:
            client = async_openai_client(options, **more)
        try:
            yield Way(name, client, runner)
        finally:
            if isinstance(client, openai.OpenAI):
                client.close()
            else:
                runner.run(client.close())
