"""What the services call of JetStream, over the model of the bus: durable publishes, SEALED, the
relay's requests to the API, and a tail's push consumer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import deque
from collections.abc import Mapping
from typing import Any

from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.kernel.errors import NotFound, Transient, Unavailable
from tests.sim.bus import Nats
from tests.sim.loop import current_process
from tests.support.collected import StreamMessage


class Live:
    """The tail's push consumer (cocoon.eventlog.tail._Live) over the model's stream."""

    def __init__(self, nc: Nats, shard: int, _: object = None) -> None:
        self.bus, self.shard, self.process = nc.bus, shard, current_process()
        self.buffer: deque[StreamMessage] = deque()
        self.arrived = asyncio.Event()
        self.heard_s = self.bus.loop.now_s
        self.generation = self.bus.generation
        self.overflowed = False

    async def open(self, first: int) -> None:
        await asyncio.sleep(self.bus.travel_s())
        if not self.bus.reachable(self.process):
            raise Transient("the bus is not connected")
        self.generation = self.bus.generation
        self.bus.tails.append(self)
        for message in self.bus.streams[self.shard]:
            if message.sequence >= first:
                self.push(message)

    def push(self, message: StreamMessage) -> None:
        self.bus.carry(self.process, "deliver event", self._take_in, message)

    def _take_in(self, message: StreamMessage) -> None:
        self.buffer.append(message)
        self.heard_s = self.bus.loop.now_s
        self.arrived.set()

    async def take(self, limit: int, timeout_s: float) -> list[StoredEvent]:
        if not self.buffer:
            self.arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self.arrived.wait()
            except TimeoutError:
                return []
        count = min(limit, len(self.buffer))
        taken = [self.buffer.popleft() for _ in range(count)]
        return [StoredEvent.from_message(m.headers, m.body) for m in taken]

    def silent_for_s(self) -> float:
        """Heartbeats come as long as the consumer is there."""
        there = self.generation == self.bus.generation and self.bus.reachable(self.process)
        if there:
            self.heard_s = self.bus.loop.now_s
        return self.bus.loop.now_s - self.heard_s

    async def close(self) -> None:
        if self in self.bus.tails:
            self.bus.tails.remove(self)


async def publish_durable(
    js: Nats, subject: str, body: bytes, headers: Mapping[str, str] | None = None,
    timeout_s: float = 5.0, *, stream: str, message_id: str | None = None,
) -> int:  # fmt: skip
    """cocoon.bus.publish.publish_durable over the model: stored or not, acknowledged or not."""
    bus = js.bus
    await asyncio.sleep(bus.travel_s())
    if not bus.reachable(js.process) or bus.faults.happens("drop"):
        await asyncio.sleep(timeout_s)
        raise Unavailable(f"{stream} did not acknowledge (TimeoutError)")
    sequence = bus.submit(subject, body, headers or {})
    if bus.faults.happens("drop"):
        await asyncio.sleep(timeout_s)
        raise Unavailable(f"{stream} did not acknowledge (TimeoutError)")
    return sequence


async def put_sealed(js: Nats, provider: str, blob: bytes, timeout_s: float = 10.0) -> str:
    """cocoon.bus.sealed.put_sealed over the model."""
    await asyncio.sleep(js.bus.travel_s())
    if not js.bus.reachable(js.process) or js.bus.faults.happens("sealed_full"):
        raise Unavailable(f"{subjects.SEALED_STREAM} took no message")
    digest = hashlib.sha256(blob).hexdigest()
    js.bus.sealed[provider, digest] = blob
    return digest


async def get_sealed(nc: Nats, provider: str, digest: str) -> bytes:
    """cocoon.bus.sealed.get_sealed over the model."""
    await asyncio.sleep(nc.bus.travel_s())
    if not nc.bus.reachable(nc.process):
        raise Unavailable("SEALED does not answer")
    found = nc.bus.sealed.get((provider, digest))
    if found is None:
        raise NotFound("there is no such blob")
    return found


async def api(nc: Nats, verb: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """cocoon.bus.streams.api: the calls of JetStream's API that the relay makes."""
    bus = nc.bus
    await asyncio.sleep(bus.travel_s())
    if not bus.reachable(nc.process):
        raise Transient("JetStream does not answer")
    kind, _, name = verb.rpartition(".")
    shard = int(name.rpartition("_")[2])
    stream, first = bus.streams[shard], bus.first_sequence[shard]
    if kind == "STREAM.INFO":
        return {"state": {"last_seq": first + len(stream) - 1, "messages": len(stream)}}
    if kind == "STREAM.MSG.GET":
        at = int((body or {})["seq"]) - first
        if not 0 <= at < len(stream):
            raise NotFound("there is no such message")
        return {"message": {"hdrs": _as_hdrs(stream[at])}}
    raise NotFound(f"the model's JetStream has no {kind}")


def _as_hdrs(message: StreamMessage) -> str:
    lines = "".join(f"{name}: {value}\r\n" for name, value in message.headers.items())
    return base64.b64encode(f"NATS/1.0\r\n{lines}\r\n".encode()).decode()
