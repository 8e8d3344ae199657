"""A model of NATS: core messages that may be lost, doubled, late or out of order; INGRESS, SEALED
and the EVENTS streams with the broker's fence. It stands behind the services' own clients' calls.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import nats.errors

from cocoon.bus.ingress import Incoming, verdict
from cocoon.kernel.errors import CocoonError
from tests.sim.faults import Faults
from tests.sim.loop import Process, SimLoop, current_process
from tests.support.collected import StreamMessage

Callback = Callable[[Any], Any]  # a coroutine function, or a direct handler
ACK_WAIT_S = 30.0


@dataclass
class Message:
    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    reply: Callable[[bytes], None] | None = None

    async def respond(self, data: bytes) -> None:
        if self.reply is not None:
            self.reply(data)


@dataclass(eq=False)
class Subscription:
    bus: Bus
    process: Process
    pattern: str
    callback: Callback

    async def unsubscribe(self) -> None:
        self.bus.forget(self)


@dataclass
class Submitted:
    """A message of INGRESS until it is acknowledged."""

    subject: str
    body: bytes
    headers: Mapping[str, str]
    stored_s: float
    deliveries: int = 0
    delivery: int = 0  # the latest: only its settlement counts
    done: bool = False


@dataclass
class Bus:
    """One NATS server."""

    loop: SimLoop
    faults: Faults
    down: bool = False
    generation: int = 0  # rises at every wipe
    streams: dict[int, list[StreamMessage]] = field(default_factory=lambda: {0: [], 1: []})
    first_sequence: dict[int, int] = field(default_factory=lambda: {0: 1, 1: 1})
    sealed: dict[tuple[str, str], bytes] = field(default_factory=dict)
    submitted: list[Submitted] = field(default_factory=list)
    tails: list[Any] = field(default_factory=list)
    worker: tuple[Process, Callback] | None = None  # billing's, of INGRESS
    cut_off: set[Process] = field(default_factory=set)
    messages: int = 0
    _lanes: dict[object, float] = field(default_factory=dict)  # when the latest arrives
    _exact: dict[str, list[Subscription]] = field(default_factory=dict)
    _prefix: dict[str, list[Subscription]] = field(default_factory=dict)

    # ---- core ----

    def subscribe(self, subscription: Subscription) -> None:
        table, key = self._place(subscription.pattern)
        table.setdefault(key, []).append(subscription)

    def forget(self, subscription: Subscription) -> None:
        table, key = self._place(subscription.pattern)
        if subscription in table.get(key, ()):
            table[key].remove(subscription)

    def _place(self, pattern: str) -> tuple[dict[str, list[Subscription]], str]:
        if pattern.endswith((".*", ".>")):
            return self._prefix, ".".join(pattern.split(".")[:2])
        return self._exact, pattern

    def hearers(self, subject: str) -> list[Subscription]:
        prefix = ".".join(subject.split(".", 2)[:2])
        found = [*self._exact.get(subject, ()), *self._prefix.get(prefix, ())]
        return [s for s in found if s.process.alive]

    def reachable(self, process: Process) -> bool:
        return not self.down and process not in self.cut_off

    def send(self, sender: Process, subject: str, message: Message) -> None:
        """Deliver to every hearer, or not, or twice, sooner or later."""
        if not self.reachable(sender):
            return
        for subscription in self.hearers(subject):
            self.carry(subscription.process, f"deliver {subject}", self._hand, subscription,
                       message)  # fmt: skip

    def carry(self, to: Process, label: str, call: Callable[..., None], *args: Any) -> None:
        """Bring one message to a process through the network's faults."""
        if self.faults.happens("drop"):
            return
        self.messages += 1
        lane = (current_process(), to)
        for _ in range(2 if self.faults.happens("duplicate") else 1):
            self.loop.at(self.travel_s(lane), label, self._arrive, to, call, args, process=to)

    def _arrive(self, to: Process, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.reachable(to):
            call(*args)

    def travel_s(self, lane: object = None) -> float:
        """How long a message travels. One lane's keep their order, but for the faults."""
        source = self.faults.random
        if self.faults.happens("reorder"):
            return source.uniform(0.001, 0.2)
        if self.faults.happens("delay"):
            return source.uniform(0.2, 8.0)
        arrives_s = self.loop.now_s + source.uniform(0.0002, 0.003)
        if lane is not None:
            arrives_s = max(arrives_s, self._lanes.get(lane, 0.0))
            self._lanes[lane] = arrives_s
        return arrives_s - self.loop.now_s

    def _hand(self, subscription: Subscription, message: Message) -> None:
        work = subscription.callback(message)
        if work is not None:
            asyncio.create_task(work)  # noqa: RUF006 - the loop holds it

    # ---- INGRESS ----

    def submit(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        item = Submitted(subject, body, headers, self.loop.now_s)
        self.submitted.append(item)
        self._offer_later(item, self.faults.random.uniform(0.0005, 0.003))
        return len(self.submitted)

    def _offer_later(self, item: Submitted, delay_s: float) -> None:
        self.loop.at(delay_s, "ingress", self._offer, item)

    def _offer(self, item: Submitted) -> None:
        if item.done or item not in self.submitted:
            return
        item.deliveries += 1
        item.delivery += 1
        self._offer_later(item, ACK_WAIT_S)  # unless it is settled until then
        if self.worker is None or not self.worker[0].alive or not self.reachable(self.worker[0]):
            item.deliveries -= 1
            self._offer_later(item, 0.5)
            return
        process, handler = self.worker
        self.loop.run_as(process, self._work, item, handler, item.delivery)

    def _work(self, item: Submitted, handler: Callback, delivery: int) -> None:
        asyncio.create_task(self._handle(item, handler, delivery))  # noqa: RUF006

    async def _handle(self, item: Submitted, handler: Callback, delivery: int) -> None:
        """What the work queue's worker does with one delivery, by its own verdict."""
        deliveries, age_s = item.deliveries, self.loop.now_s - item.stored_s
        error: Exception | None = None
        try:
            await handler(Incoming(item.subject, item.headers, item.body, deliveries, age_s))
        except Exception as caught:  # noqa: BLE001 - whatever it is, the message must be settled
            error = caught
        if error is not None and not isinstance(error, CocoonError):
            self.loop.errors.append(f"a submission broke billing: {error!r}")
        what, delay_s = verdict(error, deliveries)
        if what in ("ack", "drop"):
            self.settle(item, current_process())
        elif delivery == item.delivery and self.reachable(current_process()):
            self._offer_later(item, delay_s)

    def settle(self, item: Submitted, process: Process) -> None:
        """An acknowledgement on its way: it may be lost, and the message comes again."""
        if self.reachable(process) and not self.faults.happens("drop"):
            item.done = True
            if item in self.submitted:
                self.submitted.remove(item)

    # ---- EVENTS ----

    def publish_event(self, subject: str, body: bytes, headers: Mapping[str, str],
                      answer: Callable[[bytes], None]) -> None:  # fmt: skip
        """A relay's message reaches the broker, which takes it only at its expected place."""
        shard = int(subject.split(".")[1])
        stream = self.streams[shard]
        last = self.first_sequence[shard] + len(stream) - 1
        before = stream[-1].headers["ce-id"] if stream else ""
        follows = headers.get("Nats-Expected-Last-Msg-Id", before) == before
        if int(headers["Nats-Expected-Last-Sequence"]) != last or not follows:
            answer(json.dumps({"error": {"code": 400}}).encode())
            return
        own = {k: v for k, v in headers.items() if not k.startswith("Nats-")}
        message = StreamMessage(last + 1, subject, own, body)
        stream.append(message)
        answer(json.dumps({"seq": last + 1}).encode())
        for tail in self.tails:
            if tail.shard == shard:
                tail.push(message)

    def wipe(self) -> None:
        """Every stream is lost, as with its disk."""
        self.generation += 1
        self.submitted.clear()
        self.sealed.clear()
        for shard in self.streams:
            self.streams[shard], self.first_sequence[shard] = [], 1
        self.tails.clear()


class Nats:
    """A process's connection: what the services call of nats-py, and of JetStream beside it."""

    def __init__(self, bus: Bus, process: Process) -> None:
        self.bus, self.process = bus, process
        self._inboxes = 0

    @property
    def is_connected(self) -> bool:
        return self.bus.reachable(self.process)

    def jetstream(self) -> Nats:
        return self

    def new_inbox(self) -> str:
        self._inboxes += 1
        return f"_INBOX_{self.process.name}_{self._inboxes}.x"

    async def flush(self) -> None:
        """Nothing waits in a buffer here."""

    async def subscribe(self, subject: str, cb: Callback, **_: object) -> Subscription:
        pattern = subject.removesuffix(".*.*") + ".>" if subject.endswith(".*.*") else subject
        subscription = Subscription(self.bus, self.process, pattern, cb)
        self.bus.subscribe(subscription)
        return subscription

    async def subscribe_direct(self, subject: str, handler: Callback) -> Subscription:
        return await self.subscribe(subject, cb=handler)

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if subject.startswith("evt."):
            self._publish_event(subject, payload, reply, headers or {})
            return
        self.bus.send(self.process, subject, Message(subject, payload, headers))

    def _publish_event(
        self, subject: str, body: bytes, reply: str, headers: Mapping[str, str]
    ) -> None:
        bus, process = self.bus, self.process

        def answer(data: bytes) -> None:
            for hearer in bus.hearers(reply):
                bus.carry(hearer.process, "ack", bus._hand, hearer, Message(reply, data))

        def arrive() -> None:
            if bus.reachable(process):
                bus.publish_event(subject, body, headers, answer)

        if not bus.faults.happens("drop"):
            for _ in range(2 if bus.faults.happens("duplicate") else 1):
                bus.loop.at(bus.travel_s(self), "relay", arrive)

    async def request(
        self, subject: str, payload: bytes, timeout: float,  # noqa: ASYNC109 - nats-py's own
        headers: Mapping[str, str] | None = None,
    ) -> Message:  # fmt: skip
        if not self.is_connected:
            raise nats.errors.ConnectionClosedError
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def answered(data: bytes) -> None:
            if not future.done():
                future.set_result(Message(subject, data))

        def reply(data: bytes) -> None:
            self.bus.carry(self.process, "reply", answered, data)

        self.bus.send(self.process, subject, Message(subject, payload, headers, reply))
        async with asyncio.timeout(timeout):
            return await future
