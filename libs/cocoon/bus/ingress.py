"""A worker on a work queue: one handler, competing instances, acks in this one place.

Handler returned: ack. Transient: back with a delay. Rejected (the handler has recorded it): gone.
Fatal or anything unknown: parked at the broker for a minute and logged, so that one poisoned
message never stops the others and is never lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import nats.errors

from cocoon.kernel.errors import CocoonError, Rejected, Transient

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from cocoon.bus.client import BusClient

_log = logging.getLogger("cocoon.bus")
_FIRST_DELAY_S, _LONGEST_DELAY_S, PARKED_S = 0.25, 10.0, 60.0
# A request that a lost connection took with it is repeated after this long.
_REQUEST_S, _REQUEST_GRACE_S = 1.0, 0.25
# Nobody answers for a consumer that is away (503): asking again at once would only burn.
_USUAL_ENDS = ("404", "408")  # nothing there; the request has expired
_TOO_SOON_S, _PAUSE_S = 0.05, 0.25


@dataclass(frozen=True, slots=True)
class Incoming:
    """One delivery. `deliveries` counts from 1; `age_s` is how long it has been in the stream."""

    subject: str
    headers: Mapping[str, str]
    body: bytes
    deliveries: int
    age_s: float


IngressHandler = Callable[[Incoming], Awaitable[None]]
Declare = Callable[["BusClient"], Awaitable[None]]
Verdict = Literal["ack", "retry", "drop", "park"]


def verdict(error: BaseException | None, deliveries: int) -> tuple[Verdict, float]:
    """What to do with a message, and after how many seconds it comes back. Pure."""
    if error is None:
        return "ack", 0.0
    if isinstance(error, Transient):
        doubled = _FIRST_DELAY_S * 2 ** min(deliveries - 1, 16)
        asked = float(error.retry_after_s) if error.retry_after_s is not None else doubled
        return "retry", min(asked, _LONGEST_DELAY_S)
    if isinstance(error, Rejected):
        return "drop", 0.0
    return "park", PARKED_S


class IngressWorker:
    """Takes from a pull consumer, which it declares again when the broker has forgotten it.

    Asks for as many messages as it has room for, and handles up to `workers` at once.
    """

    def __init__(
        self, nc: BusClient, stream: str, durable: str, handler: IngressHandler, *,
        declare: Declare, workers: int = 64,
    ) -> None:  # fmt: skip
        self._declare = declare
        self._nc, self._handler, self._workers = nc, handler, workers
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._running: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._owed = 0  # messages that the server may still send for the last request
        self._asked_s = 0.0
        self._idle = True  # the last request brought no message yet
        self._turned_away = False

    async def run(self) -> None:
        """Work until cancelled; what is being handled then comes again to the next worker."""
        inbox = self._nc.new_inbox()
        subscription = await self._nc.subscribe_direct(inbox, self._on_message)
        try:
            while True:
                self._changed.clear()
                room = self._workers - len(self._running)
                if self._owed <= 0 and room * 4 >= self._workers and self._nc.is_connected:
                    await self._ask(inbox, room)
                try:
                    # not wait_for: until Python 3.12 it can swallow a cancellation
                    async with asyncio.timeout(_REQUEST_S + _REQUEST_GRACE_S):
                        await self._changed.wait()
                except TimeoutError:
                    self._owed = 0  # the request or its end was lost with a connection
                if self._turned_away:
                    self._turned_away = False
                    await asyncio.sleep(_PAUSE_S)
                    with contextlib.suppress(CocoonError):  # the queue itself may be away
                        await self._declare(self._nc)
        finally:
            for task in self._running:
                task.cancel()
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _ask(self, inbox: str, room: int) -> None:
        request = {"batch": room, "expires": int(_REQUEST_S * 1e9)}
        self._owed, self._idle, self._asked_s = room, True, time.monotonic()
        with contextlib.suppress(nats.errors.Error):
            await self._nc.publish(self._next, json.dumps(request).encode(), reply=inbox)

    def _on_message(self, message: Msg) -> None:
        # a delivery has a reply to settle it by; its headers are whatever its sender wrote
        if not message.reply and message.headers and "Status" in message.headers:
            self._owed = 0  # the request has expired, or the consumer was away
            at_once = self._idle and time.monotonic() - self._asked_s < _TOO_SOON_S
            self._turned_away = at_once or message.headers["Status"] not in _USUAL_ENDS
        else:
            self._owed, self._idle = self._owed - 1, False
            task = asyncio.create_task(_settle(message, self._handler))
            self._running.add(task)
            task.add_done_callback(self._done)
        if self._owed <= 0:
            self._changed.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._owed <= 0:
            self._changed.set()


async def _settle(message: Msg, handler: IngressHandler) -> None:
    metadata = message.metadata
    error: Exception | None = None
    try:
        await handler(
            Incoming(
                subject=message.subject,
                headers=message.headers or {},
                body=message.data,
                deliveries=metadata.num_delivered or 1,
                age_s=max(0.0, time.time() - metadata.timestamp.timestamp()),
            )
        )
    except Exception as caught:  # noqa: BLE001 - whatever it is, the message must be settled
        error = caught
    what, delay_s = verdict(error, metadata.num_delivered or 1)
    # a lost acknowledgement lets the message come again, which its handler expects
    with contextlib.suppress(nats.errors.Error, OSError):
        if what == "ack":
            await message.ack()
        elif what == "retry":
            await message.nak(delay=delay_s)
        elif what == "drop":
            await message.term()
        else:
            # The type and an own error's sentence only: a foreign message may quote the body.
            _log.error(
                "a message is parked",
                extra={
                    "subject": message.subject,
                    "kind": type(error).__name__,
                    "reason": error.message if isinstance(error, CocoonError) else "",
                },
            )
            await message.nak(delay=delay_s)
