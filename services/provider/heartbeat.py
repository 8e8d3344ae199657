"""Once a second: which jobs run here. It renews their leases and says that this agent is alive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import nats.errors

from cocoon.contracts import subjects
from cocoon.contracts.messages import Heartbeat
from services.provider.backends.base import EngineLoad

if TYPE_CHECKING:
    from nats.aio.client import Client

MAX_PAIRS: Final = 8192


class Heart:
    """Beats until cancelled. Finished jobs stay named until the network has their result."""

    def __init__(
        self, nc: Client, provider_id: str, boot_id: str,
        pairs: Callable[[], list[tuple[str, int]]], draining: Callable[[], bool],
        *, concurrency: int, interval_s: float, load: EngineLoad | None = None,
    ) -> None:  # fmt: skip
        self._nc = nc
        self._provider_id = provider_id
        self._boot_id = boot_id
        self._pairs = pairs
        self._draining = draining
        self._concurrency = concurrency
        self._interval_s = interval_s
        self._load = load or EngineLoad()  # what others have of the engine is not offered
        self._sequence = 0

    async def beat(self) -> None:
        """Send one heartbeat; a lost one is the next one's business."""
        message = Heartbeat(
            provider_id=self._provider_id, boot_id=self._boot_id, sequence=self._sequence,
            running=tuple(self._pairs()[:MAX_PAIRS]),
            concurrency=max(1, self._concurrency - self._load.elsewhere),
            draining=self._draining(),
        )  # fmt: skip
        self._sequence += 1
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(subjects.heartbeat(self._provider_id), message.to_canonical())

    async def run(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(self._interval_s)
