"""Published manifests by model id: asked of attestation once, for they never change.

The gateway vouches for nothing: whoever asks hashes the bytes himself, as docs/models.md says.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import ManifestRequest
from cocoon.kernel.errors import Unavailable

if TYPE_CHECKING:
    from nats.aio.client import Client

MAX_CACHED_BYTES: Final = 8 * 1024 * 1024
MAX_FETCHES: Final = 32


class Manifests:
    """Documents by model id. What is not there is asked for again: it may have come meanwhile."""

    def __init__(self, nc: Client, timeout_s: float) -> None:
        self._nc, self._timeout_s = nc, timeout_s
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._fetches: dict[str, asyncio.Task[bytes]] = {}

    async def document(self, model_id: str) -> bytes:
        """The manifest's bytes. Raises NotFound, Unavailable."""
        cached = self._cache.get(model_id)
        if cached is not None:
            self._cache.move_to_end(model_id)
            return cached
        task = self._fetches.get(model_id)
        if task is None:
            if len(self._fetches) >= MAX_FETCHES:
                raise Unavailable("manifests are asked for too often; try again", retry_after_s=1)
            task = asyncio.create_task(self._fetch(model_id))
            self._fetches[model_id] = task
            task.add_done_callback(lambda done: self._done(model_id, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        running = list(self._fetches.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, model_id: str) -> bytes:
        body = ManifestRequest(model_id=model_id)
        text = await ask(self._nc, subjects.MANIFEST_REQUEST, body, self._timeout_s)
        document = text.encode()
        if hashlib.sha256(document).hexdigest() != model_id:  # caches keep what is told here
            raise Unavailable("the manifest did not come whole; try again", retry_after_s=1)
        return document

    def _done(self, model_id: str, task: asyncio.Task[bytes]) -> None:
        self._fetches.pop(model_id, None)
        if task.cancelled() or task.exception() is not None:
            return  # whoever waits is told; a failure is not remembered
        self._cache[model_id] = task.result()
        self._cached_bytes += len(task.result())
        while self._cached_bytes > MAX_CACHED_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)
