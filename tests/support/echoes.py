"""Everything is said again: what an identity hears, another one repeats, twice and out of order.

Both ends use the network's own keys and keep to their permissions: it is what a bus does that
delivers more than once, and what a provider or a gateway could do on purpose.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import nats.errors
from nacl.signing import SigningKey

from cocoon.bus.client import BusClient
from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, raw_seed, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.contracts import subjects
from cocoon.contracts.events import ResultSealed
from cocoon.contracts.messages import SubmitResult, submission_bytes
from cocoon.kernel.ids import gateway_id, provider_id
from tests.support.collected import Evidence
from tests.support.network import LiveNetwork

if TYPE_CHECKING:
    from nats.aio.msg import Msg

LATEST_S = 0.6  # a repeat comes up to so much later
_SEEN = 200_000


@dataclass
class Echoes:
    """Repeats while it lives. `said` counts by kind."""

    network: LiveNetwork
    said: Counter[str] = field(default_factory=Counter)
    _random: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311
    _seen: set[tuple[str, bytes]] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def repeat(self, kind: str, hears: BusClient, subject: str, says: BusClient) -> None:
        """Let `says` repeat what `hears` hears on a subject."""

        async def on_message(message: Msg) -> None:
            key = (message.subject, message.data)
            if key in self._seen or len(self._seen) >= _SEEN:
                return  # an echo of our own
            self._seen.add(key)
            for _ in range(2):
                task = asyncio.create_task(self._say(kind, says, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        await hears.subscribe(subject, cb=on_message)

    async def _say(self, kind: str, says: BusClient, message: Msg) -> None:
        await asyncio.sleep(self._random.uniform(0, LATEST_S))
        try:
            await says.publish(message.subject, message.data, headers=message.headers)
        except nats.errors.Error:
            return
        self.said[kind] += 1

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _as(stack: AsyncExitStack, network: LiveNetwork, name: str, who: str) -> BusClient:
    seed = network.folder.seed(name)
    nc = await connect(network.running.nats_url, seed, f"echo-{name}", inbox_prefix(who))
    stack.push_async_callback(close, nc)
    return nc


def provider_of(network: LiveNetwork, name: str) -> str:
    return provider_id(raw_public(read_seed_file(network.folder.seed(name))))


@asynccontextmanager
async def echoes(network: LiveNetwork, providers: Sequence[str]) -> AsyncIterator[Echoes]:
    """Repeat frames, dispatches, matches, heartbeats and acknowledgements inside the block."""
    async with AsyncExitStack() as stack:
        own = gateway_id(raw_public(read_seed_file(network.folder.seed("gateway"))))
        gateway = await _as(stack, network, "gateway", own)
        matcher = await _as(stack, network, "matcher", "matcher")
        billing = await _as(stack, network, "billing", "billing")
        operator = await _as(stack, network, "operator", "operator")
        found = Echoes(network)
        stack.push_async_callback(found.end)
        await found.repeat("match", gateway, f"mat.{own}.*", matcher)
        for name in providers:
            ident = provider_of(network, name)
            provider = await _as(stack, network, name, ident)
            await found.repeat("frame", gateway, f"tok.{own}.{ident}.>", provider)
            await found.repeat("dispatch", provider, subjects.run_job(ident), gateway)
            await found.repeat("ack", provider, subjects.acks(ident), billing)
            await found.repeat("heartbeat", operator, subjects.heartbeat(ident), provider)
        yield found


async def submit_again(network: LiveNetwork, evidence: Evidence, providers: Sequence[str]) -> int:
    """Every settled result comes to INGRESS again, the newest first, twice; how many."""
    keys = {provider_of(network, name): name for name in providers}
    results = [
        event
        for rows in evidence.decoded.values()
        for _, event in rows
        if isinstance(event, ResultSealed) and event.provider_id in keys
    ]
    async with AsyncExitStack() as stack:
        clients = {i: await _as(stack, network, name, i) for i, name in keys.items()}
        for event in [*reversed(results), *results]:
            seed = read_seed_file(network.folder.seed(keys[event.provider_id]))
            told = (event.provider_id, event.job_id, event.epoch, event.receipt, event.blob_hash)
            message = SubmitResult(
                provider_id=event.provider_id, job_id=event.job_id, epoch=event.epoch,
                receipt=event.receipt, blob_hash=event.blob_hash,
                response_bytes=event.response_bytes,
                signature=SigningKey(raw_seed(seed)).sign(submission_bytes(*told)).signature.hex(),
            )  # fmt: skip
            subject = subjects.submit_result(event.provider_id)
            js = clients[event.provider_id].jetstream()
            await js.publish(subject, message.to_canonical(), timeout=10)
    return 2 * len(results)


async def relay_again(network: LiveNetwork, evidence: Evidence, last: int) -> int:
    """The last events of every stream are published again as the relay would, newest first."""
    said = 0
    async with AsyncExitStack() as stack:
        billing = await _as(stack, network, "billing", "billing")
        for rows in (evidence.streams or {}).values():
            for message in [*reversed(rows[-last:]), *rows[-last:]]:
                await billing.publish(message.subject, message.body, headers=message.headers)
                said += 1
        await billing.flush(timeout=5)
    return said
