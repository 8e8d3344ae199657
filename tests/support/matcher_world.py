"""One shard's matcher over a model log, with a clock that stands still until it is told to move.

Nothing is replaced but the bus (updates are collected) and Postgres (a ModelLog).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from cocoon.contracts.commands import RequestJob, decode_command
from cocoon.contracts.events import AccountOpened, DepositCredited
from cocoon.contracts.messages import DispatchReport, JobRequest, MatchUpdate
from cocoon.eventlog.append import LogAppender
from cocoon.kernel.errors import CocoonError
from services.matcher.handlers import Matcher
from services.matcher.leases import Leases
from services.matcher.memory import Memory
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings
from tests.support.example_events import put
from tests.support.job_world import FEE_BPS, LEASE_TTL_MS, NOW_MS, PROVIDERS, Provider, hex16
from tests.support.model_log import ModelAppender, ModelLog

SETTINGS = MatcherSettings(
    nats_url="nats://127.0.0.1:1", nats_seed_file=Path("unused"), postgres_dsn_file=Path("unused"),
    shard=1, fee_bps=FEE_BPS, lease_ttl_ms=LEASE_TTL_MS, provider_silence_s=3.0,
    cancel_grace_s=5.0, waiting_s=10.0, waiting_limit=8, waiting_limit_per_account=4,
)  # fmt: skip


@dataclass
class ManualClock:
    passed_s: float = 1000.0

    def now_ms(self) -> int:
        return NOW_MS + int((self.passed_s - 1000.0) * 1000)

    def monotonic_s(self) -> float:
        return self.passed_s


@dataclass
class Counted:
    count: int = 0

    def token(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(b"draw" + self.count.to_bytes(4, "big")).digest(size)


@dataclass
class KeptSecrets:
    """The matcher's table as a list: it outlives the process, like the log."""

    kept: list[bytes] = field(default_factory=list)

    async def load(self) -> list[bytes]:
        return list(self.kept)

    async def keep(self, secret: bytes) -> None:
        if secret not in self.kept:
            self.kept.append(secret)

    async def forget(self, secret: bytes) -> None:
        self.kept.remove(secret)


def requests_in(log: ModelLog, job_ids: Sequence[str]) -> list[RequestJob]:
    """The stored commands that began these jobs."""
    firsts = [log.stream(f"job/{job_id}")[0] for job_id in job_ids]
    found = [decode_command(log.commands[first.causation_id].data) for first in firsts]
    return [command for command in found if isinstance(command, RequestJob)]


@dataclass
class MatcherWorld:
    """`log` and `network` outlive a `restart`; everything else is the process's memory."""

    settings: MatcherSettings = SETTINGS
    clock: ManualClock = field(default_factory=ManualClock)
    log: ModelLog = field(default_factory=lambda: ModelLog(1))
    network: ModelLog = field(default_factory=lambda: ModelLog(0))
    randomness: Counted = field(default_factory=Counted)
    secrets: KeptSecrets = field(default_factory=KeptSecrets)
    updates: list[MatchUpdate] = field(default_factory=list)
    stopped: list[CocoonError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log.now_us = lambda: self.clock.now_ms() * 1000

    async def start(self) -> None:
        """Take the shard over, fold the logs, resume."""
        self.appender = ModelAppender(self.log, "matcher")
        await self.appender.acquire_term()
        self.memory = Memory(self.settings.fee_bps, self.settings.provider_silence_s)
        appender = cast("LogAppender", self.appender)
        self.seeds = Seeds(
            self.settings, self.memory, appender, self.secrets, self.clock, self.randomness
        )
        self.leases = Leases(
            self.settings, self.memory, appender, self._hear, self.clock, self.seeds,
            self.stopped.append,
        )  # fmt: skip
        self.matcher = Matcher(
            self.settings, self.memory, self.leases, appender, self._hear, self.clock, self.seeds,
            self.stopped.append, self._find_job, self._find_requests,
        )  # fmt: skip
        self._tailed = self._tailed_network = 0
        self.tail()
        await self.seeds.begin()
        await self.seeds.tick()
        self.tail()
        await self.matcher.resume()

    async def restart(self) -> None:
        await self.leases.close()
        await self.appender.close()
        await self.start()

    async def _find_job(self, command_id: str) -> str | None:
        return self.log.job_of_command(command_id)

    async def _find_requests(self, job_ids: Sequence[str]) -> list[RequestJob]:
        return requests_in(self.log, job_ids)

    async def _hear(
        self, gateway_id: str, job_id: str, update: MatchUpdate, traceparent: str
    ) -> None:
        self.updates.append(update)

    # ---- what the rest of the network does ----

    def fund(self, account: str = "acct_1", nanoton: int = 1_000_000) -> None:
        events = [
            AccountOpened(account_id=account),
            DepositCredited(
                account_id=account, amount_nanoton=nanoton, source="dev", reference="first"
            ),
        ]
        put(self.log, f"account/{account}", events)
        self.tail()

    def enrol(self, *providers: Provider, alive: bool = True) -> None:
        for provider in providers or PROVIDERS:
            put(self.network, f"provider/{provider.id}", provider.network_events())
            self.tail()
            if alive:
                self.leases.on_heartbeat(provider.beat())

    def tail(self) -> None:
        """Bring what is in the logs to the matcher."""
        for stored in self.network.events[self._tailed_network :]:
            self._tailed_network += 1
            self.matcher.on_network_event(stored)
        for stored in self.log.events[self._tailed :]:
            self._tailed += 1
            self.matcher.on_shard_event(stored)

    async def settle(self) -> None:
        """Let tasks run until nothing moves; the tail keeps up."""
        for _ in range(20):
            await asyncio.sleep(0)
            self.tail()

    async def ask(self, *requests: JobRequest) -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(self.matcher.on_job_request(request, ""))
        self.tail()

    async def sweep(self, passed_s: float = 0.0, *alive: Provider) -> None:
        """Let time pass; `alive` providers are heard at its end."""
        self.clock.passed_s += passed_s
        for provider in alive:
            self.beat(provider)
        await self.matcher.sweep()
        await self.settle()

    def beat(self, provider: Provider, *jobs: str, boot: str = "boot 1") -> None:
        """A heartbeat naming the provider's live jobs, or the given ones."""
        live = self.memory.providers[provider.id].live_jobs
        named = [hex16(job) for job in jobs] or list(live)
        epochs = [(j, self.leases.live[j].match.epoch) for j in named if j in self.leases.live]
        self.leases.on_heartbeat(provider.beat(*epochs, boot=boot))

    def report(self, job: str, outcome: str, code: str = "none", epoch: int = 1) -> None:
        fields = {"job_id": hex16(job), "epoch": epoch, "outcome": outcome, "code": code}
        self.leases.on_report(DispatchReport.model_validate(fields))

    # ---- what is seen ----

    def heard(self, job: str = "job") -> list[str]:
        return [update.kind for update in self.updates if update.job_id == hex16(job)]

    def last(self, job: str = "job") -> MatchUpdate:
        return [update for update in self.updates if update.job_id == hex16(job)][-1]

    def matched_to(self, job: str = "job") -> Provider:
        """Whom the job was matched to last."""
        found = [u for u in self.updates if u.job_id == hex16(job) and u.kind == "matched"][-1]
        return next(p for p in PROVIDERS if p.id == found.provider_id)

    def types(self, job: str = "job") -> list[str]:
        return [stored.type for stored in self.log.stream(f"job/{hex16(job)}")]


async def ready_world(nanoton: int = 1_000_000, *providers: Provider) -> MatcherWorld:
    """A started matcher with a funded account and living providers."""
    world = MatcherWorld()
    await world.start()
    world.fund(nanoton=nanoton)
    world.enrol(*providers)
    return world
