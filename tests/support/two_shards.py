"""A network with two account shards: an account on each, its clients, what its providers ran."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import httpx

from cocoon.bus.connection import close, connect
from cocoon.bus.permissions import inbox_prefix
from cocoon.contracts.events import OfferPublished, ResultSealed
from cocoon.devnet.accounts import create_key, fund, new_account_id, open_account, shard_of
from cocoon.kernel.money import NANOTON_PER_TON
from cocoon.sealing.receipt import Receipt
from tests.support.client_load import Call, ClientLoad
from tests.support.collected import ClientCall, Evidence
from tests.support.extra_processes import connected
from tests.support.network import LiveNetwork


@dataclass
class Customer:
    """An account with funds and a key, and all that its clients have seen."""

    shard: int
    account_id: str
    api_key: str = field(repr=False)
    history: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Spell:
    """A job at a provider, as the enclave's signed receipt tells it. Wall clock, milliseconds."""

    provider_id: str
    shard: int
    opened_ms: int
    ended_ms: int


async def customer(network: LiveNetwork, shard: int) -> Customer:
    """Open an account that belongs to this shard."""
    shards = network.running.shards[1:]
    account_id = new_account_id()
    while shard_of(account_id, shards) != shard:
        account_id = new_account_id()
    seed = network.folder.seed("operator")
    nc = await connect(network.running.nats_url, seed, "test", inbox_prefix("operator"))
    try:
        await open_account(nc, account_id, shards)
        await fund(nc, account_id, 10 * NANOTON_PER_TON, "test", shards)
        key = await create_key(nc, account_id, "test")
    finally:
        await close(nc)
    return Customer(shard, account_id, key.text)


@dataclass
class TwoShards:
    """The network, a sidecar whose callers bring their own keys, a customer of each shard."""

    network: LiveNetwork
    sidecar: str
    canary: str
    customers: dict[int, Customer] = field(default_factory=dict)

    def load(self, shard: int, callers: int = 4, max_retries: int = 2) -> ClientLoad:
        """Stock clients of this shard's customer."""
        who = self.customers[shard]
        return ClientLoad(
            self.network, self.canary, callers, max_retries=max_retries, history=who.history,
            base_url=self.sidecar, api_key=who.api_key,
        )  # fmt: skip

    def calls(self) -> list[ClientCall]:
        found = []
        for shard, who in self.customers.items():
            found += self.load(shard).calls(who.account_id)
        return found


@contextmanager
def two_shards(network: LiveNetwork, canary: str) -> Iterator[TwoShards]:
    """A sidecar without a key beside a running network."""
    with connected(network) as sidecar:
        yield TwoShards(network, sidecar.base_url, canary)


_GAUGE = re.compile(r"^cocoon_jobs_in_flight (\S+)$", re.MULTILINE)
_LOOK_S = 0.02


@asynccontextmanager
async def watched(network: LiveNetwork, provider: str) -> AsyncIterator[list[int]]:
    """What a provider's own metric says that it runs, looked at all the time."""
    url, seen = network.running.observe_urls[provider], list[int]()

    async def look() -> None:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while True:
                found = _GAUGE.search((await http.get(f"{url}/metrics")).text)
                if found is not None:
                    seen.append(int(float(found[1])))
                await asyncio.sleep(_LOOK_S)

    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking


def spells(evidence: Evidence) -> list[Spell]:
    """Every job that a provider answered for, over all shards."""
    found = []
    for shard, rows in evidence.decoded.items():
        for _, event in rows:
            if isinstance(event, ResultSealed):
                receipt = Receipt.decode(bytes.fromhex(event.receipt))
                found.append(Spell(event.provider_id, shard, receipt.opened_ms, receipt.last_ms))
    return found


def most_at_once(found: list[Spell]) -> dict[str, int]:
    """Provider -> the most jobs that its receipts say it ran at one time.

    A slot is taken before a receipt's first time and given back after its last, so this never
    overstates. A job that ends in the millisecond in which another begins does not meet it.
    """
    steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for spell in found:
        steps[spell.provider_id] += [(spell.opened_ms, 1), (spell.ended_ms, -1)]
    most = {}
    for provider_id, changes in steps.items():
        running = peak = 0
        for _, change in sorted(changes):
            running += change
            peak = max(peak, running)
        most[provider_id] = peak
    return most


def meetings(found: list[Spell]) -> int:
    """How many pairs of jobs of different shards one provider ran at the same time."""
    return sum(
        a.provider_id == b.provider_id
        and a.shard < b.shard
        and max(a.opened_ms, b.opened_ms) < min(a.ended_ms, b.ended_ms)
        for a in found
        for b in found
    )


def offered(evidence: Evidence) -> dict[str, int]:
    """Provider -> how many jobs it offers to run at once, by its latest offer."""
    return {
        event.provider_id: event.concurrency
        for _, event in evidence.decoded[0]
        if isinstance(event, OfferPublished)
    }
