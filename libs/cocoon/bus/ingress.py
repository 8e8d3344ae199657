"""A worker on a work queue: one handler, competing instances, acks in this one place.

Handler returned: ack. Transient: back with a delay. Rejected (the handler has recorded it): gone.
Fatal or anything unknown: parked at the broker for a minute and logged, so that one poisoned
message never stops the others and is never lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cocoon.kernel.errors import CocoonError, Rejected, Transient

if TYPE_CHECKING:
    from faststream.nats import NatsBroker
    from faststream.nats.message import NatsMessage

_log = logging.getLogger("cocoon.bus")
_FIRST_DELAY_S, _LONGEST_DELAY_S, PARKED_S = 0.25, 10.0, 60.0


@dataclass(frozen=True, slots=True)
class Incoming:
    """One delivery. `deliveries` counts from 1; `age_s` is how long it has been in the stream."""

    subject: str
    headers: Mapping[str, str]
    body: bytes
    deliveries: int
    age_s: float


IngressHandler = Callable[[Incoming], Awaitable[None]]
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


def ingress_worker(
    broker: NatsBroker,
    stream: str,
    durable: str,
    handler: IngressHandler,
    *,
    subject: str,
    inbox_prefix: str,
    workers: int = 64,
) -> None:
    """Subscribe `handler` to a durable consumer that deployment has declared.

    Up to `workers` messages are handled at once. Call it before `broker.start()`.
    """
    from faststream import AckPolicy
    from faststream.nats import JStream, PullSub

    subscriber = broker.subscriber(
        subject,
        stream=JStream(stream, declare=False),
        durable=durable,
        # One by one: a larger fetch waits until it is full and inverts the order.
        pull_sub=PullSub(batch_size=1, timeout=5.0),
        ack_policy=AckPolicy.MANUAL,
        max_workers=workers,
        inbox_prefix=f"{inbox_prefix}.".encode(),
        no_reply=True,
    )

    async def on_message(message: NatsMessage) -> None:
        await _settle(message, handler)

    subscriber(on_message)


async def _settle(message: NatsMessage, handler: IngressHandler) -> None:
    raw = message.raw_message
    metadata = raw.metadata
    error: Exception | None = None
    try:
        await handler(
            Incoming(
                subject=raw.subject,
                headers=raw.headers or {},
                body=raw.data,
                deliveries=metadata.num_delivered or 1,
                age_s=max(0.0, time.time() - metadata.timestamp.timestamp()),
            )
        )
    except Exception as caught:  # noqa: BLE001 - whatever it is, the message must be settled
        error = caught
    what, delay_s = verdict(error, metadata.num_delivered or 1)
    if what == "ack":
        await message.ack()
    elif what == "retry":
        await message.nack(delay=delay_s)
    elif what == "drop":
        await message.reject()
    else:
        # The type and an own error's sentence only: a foreign message may quote the body.
        _log.error(
            "a message is parked",
            extra={
                "subject": raw.subject,
                "kind": type(error).__name__,
                "reason": error.message if isinstance(error, CocoonError) else "",
            },
        )
        await message.nack(delay=delay_s)
