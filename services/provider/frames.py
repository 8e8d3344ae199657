"""A response's bytes on their way to the gateway: numbered messages of at most 256 KiB.

Frames may be lost: the whole response is in SEALED, so a failed publish is nothing to stop for.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import nats.errors

from cocoon.contracts import subjects

if TYPE_CHECKING:
    from nats.aio.client import Client

MAX_FRAME_MESSAGE_BYTES: Final = 256 * 1024
MORE: Final = 0
LAST: Final = 1
DISPATCHED: Final = 2


@dataclass(frozen=True, slots=True)
class Route:
    """Where a response goes: which gateway, under which lease epoch."""

    gateway: str
    epoch: int


def encode(kind: int, offset: int, data: bytes, blob_hash: bytes = b"") -> bytes:
    """kind u8 | offset u64 | [blob hash 32] | bytes."""
    return bytes((kind,)) + offset.to_bytes(8, "big") + blob_hash + data


class FrameSender:
    """Publishes frames for this provider."""

    def __init__(self, nc: Client, provider_id: str) -> None:
        self._nc = nc
        self._provider_id = provider_id

    async def answer(self, job_id: str, route: Route, reply: bytes) -> None:
        """Say whether a dispatch was taken: kind u8, then the DispatchReply."""
        subject = subjects.tokens(route.gateway, self._provider_id, job_id, route.epoch)
        # without an answer the gateway counts this agent as silent, and tries the next one
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(subject, bytes((DISPATCHED,)) + reply)

    async def send(
        self, job_id: str, route: Route, offset: int, data: bytes, blob_hash: bytes | None = None
    ) -> None:
        """Send bytes from `offset` on; a blob hash makes the last message the last one of all."""
        subject = subjects.tokens(route.gateway, self._provider_id, job_id, route.epoch)
        starts = range(0, len(data), MAX_FRAME_MESSAGE_BYTES) if data else range(1)
        for start in starts:
            part = data[start : start + MAX_FRAME_MESSAGE_BYTES]
            last = blob_hash is not None and start == starts[-1]
            body = encode(
                LAST if last else MORE, offset + start, part, blob_hash or b"" if last else b""
            )
            # nats-py buffers while it reconnects; what it cannot take is in SEALED anyway
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._nc.publish(subject, body)
