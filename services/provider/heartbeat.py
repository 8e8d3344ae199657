"""Once a second: which jobs run here. It renews their leases and says that this agent is alive.

And which models have no room, or no engine: at once, when that has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import nats.errors

from cocoon.contracts import subjects
from cocoon.contracts.messages import Heartbeat

if TYPE_CHECKING:
    from nats.aio.client import Client

MAX_PAIRS: Final = 8192
SOON_S: Final = 0.1  # after a change; so no change makes more than ten heartbeats a second


def _no_models() -> tuple[str, ...]:
    return ()


class Heart:
    """Beats until cancelled. Finished jobs stay named until the network has their result."""

    def __init__(
        self, nc: Client, provider_id: str, boot_id: str,
        pairs: Callable[[], list[tuple[str, int]]], draining: Callable[[], bool],
        room: Callable[[], int], *, interval_s: float,
        full: Callable[[], tuple[str, ...]] = _no_models,
        away: Callable[[], tuple[str, ...]] = _no_models,
        barred: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._nc = nc
        self._provider_id = provider_id
        self._boot_id = boot_id
        self._pairs = pairs
        self._draining = draining
        self._room = room
        self._full = full
        self._away = away
        self._barred = barred
        self._interval_s = interval_s
        self._sequence = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Beat soon: the network should know before the next second."""
        self._changed.set()

    async def beat(self) -> None:
        """Send one heartbeat; a lost one is the next one's business."""
        self._changed.clear()
        if self._barred():
            return  # the network has turned this agent out: nobody hears it
        message = Heartbeat(
            provider_id=self._provider_id, boot_id=self._boot_id, sequence=self._sequence,
            running=tuple(self._pairs()[:MAX_PAIRS]),
            concurrency=self._room(), draining=self._draining(),
            full=self._full(), away=self._away(),
        )  # fmt: skip
        self._sequence += 1
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(subjects.heartbeat(self._provider_id), message.to_canonical())

    async def run(self) -> None:
        while True:
            await self.beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._changed.wait()
                    await asyncio.sleep(SOON_S)
