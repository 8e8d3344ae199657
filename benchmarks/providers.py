"""What a job costs the platform when there are many providers: 1, 3, 100, 1,000 of them.

Real matcher, billing, NATS and Postgres. The providers are enrolled in the log and send their
heartbeats once a second; this process plays them and the gateway: it asks for jobs, 64 at once,
and submits a signed result for each match. A request is sealed to at most three providers,
as a client does, so one provider's jobs name one candidate: the row of three tells what that is
worth. Enclaves, gateway and client are not here; what they do for a job names three providers at
most.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import uvloop
from nats.aio.msg import Msg

from benchmarks.processes import Groups, process
from benchmarks.report import Aim, Column, Finding, Question, Row, Rows, middle, ratio
from benchmarks.servers import ACCOUNTS, SHARD, Clock, nats, new_name, postgres, prepare_log
from benchmarks.servers import scratch as scratch_folder
from cocoon.bus.client import BusClient
from cocoon.bus.connection import close, connect
from cocoon.bus.keys import new_seed, write_seed_file
from cocoon.bus.streams import declare_streams
from cocoon.contracts import subjects
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import EventData
from cocoon.contracts.messages import MatchUpdate
from cocoon.eventlog.append import LogAppender
from tests.support import job_world as world

GATEWAY, AT_ONCE, RECIPIENTS = "gw1", 64, 3
CONCURRENCY, LONG_MS = 256, 3_600_000
JOB_TIMEOUT_S, HEARTBEAT_S, IDLE_S, BEAT_PAUSE_S = 30.0, 1.0, 3.0, 0.02
MAX_TRIES, RETRY_S, LOAD_TIMEOUT_S = 20, 0.5, 180
SERVICES = ("matcher", "billing")


def _name(count: int) -> str:
    return f"{count:,} provider{'s' if count > 1 else ''}"


PROVIDERS = Question(
    "providers",
    "The platform's CPU a job by number of providers; what it costs without jobs is apart",
    (
        Column("cpu_us", "CPU a job, us"), Column("matcher_us", "matcher, us"),
        Column("billing_us", "billing, us"), Column("nats_us", "NATS, us"),
        Column("postgres_us", "Postgres, us"), Column("jobs_per_s", "jobs/s"),
        Column("refused", "refused, tried again"),
        Column("gross_us", "with heartbeats at this rate, us"),
        Column("idle_ms_per_s", "without jobs, ms CPU/s", 1),
    ),
    lambda rows: [
        Aim(f"cost a job, 1,000 providers of {small}", "at most", 1.2,
            ratio(rows, _name(1000), _name(small), "cpu_us"))
        for small in (1, 3)
    ],
)  # fmt: skip


def _current(event: EventData) -> EventData:
    """An event of the tests' world, valid for an hour from now."""
    now_ms = time.time_ns() // 1_000_000
    fields = type(event).model_fields
    fresh = {"valid_until_ms": now_ms + LONG_MS, "not_before_ms": now_ms - 1000,
             "not_after_ms": now_ms + LONG_MS}  # fmt: skip
    return event.model_copy(update={k: v for k, v in fresh.items() if k in fields})


async def _enrol(dsn: str, providers: list[world.Provider]) -> None:
    appender = LogAppender(dsn, subjects.NETWORK_SHARD, "attestation")
    await appender.acquire_term()
    for provider in providers:
        stream = f"provider/{provider.id}"
        events = tuple(NewEvent(stream, _current(e)) for e in provider.network_events())
        await appender.append(
            AppendItem(
                command_id=f"enrol-{provider.name}", command=b"{}", actor="attestation",
                correlation_id=provider.id, expects=((stream, 0),), events=events, traceparent="",
            )
        )  # fmt: skip
    await appender.close()


class Refused(Exception):
    """The matcher did not take a job, or ended it."""


class Players:
    """The gateway and the providers of one world: asks, heartbeats, results."""

    def __init__(self, nc: BusClient, providers: list[world.Provider]) -> None:
        self._nc, self._providers = nc, providers
        self._by_id = {p.id: p for p in providers}
        self._beats = [
            (subjects.heartbeat(p.id), p.beat().model_dump_json().encode()) for p in providers
        ]
        self.refused = 0
        self._random = random.Random(1)  # noqa: S311 - whom a job is sealed to
        self._requests: dict[str, Any] = {}
        self._done: dict[str, asyncio.Future[None]] = {}

    async def listen(self) -> None:
        await self._nc.subscribe_direct(f"mat.{GATEWAY}.*", self._on_update)
        await self._nc.subscribe_direct("ack.provider.*", self._on_ack)

    async def beat(self) -> None:
        """Every provider once a second, spread over it, however busy this loop is."""
        began_s, sent = time.perf_counter(), 0
        while True:
            passed = (time.perf_counter() - began_s) / HEARTBEAT_S
            due = int(passed * len(self._beats)) + 1
            for number in range(sent, due):
                await self._nc.publish(*self._beats[number % len(self._beats)])
            sent = due
            await asyncio.sleep(BEAT_PAUSE_S)

    async def load(self, jobs: int) -> None:
        left = iter(range(jobs))

        async def work() -> None:
            for _ in left:
                await self._job()

        async with asyncio.timeout(LOAD_TIMEOUT_S):
            await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def _job(self) -> None:
        for _ in range(MAX_TRIES):
            try:
                await self._try_job()
            except Refused:  # a busy machine stands still for longer than a provider may
                self.refused += 1
                await asyncio.sleep(RETRY_S)
            else:
                return
        raise RuntimeError(f"a job was refused {MAX_TRIES} times")

    async def _try_job(self) -> None:
        name = new_name()
        chosen = self._random.sample(self._providers, min(RECIPIENTS, len(self._providers)))
        request = world.job_request(
            name, account=f"acct_{hash(name) % ACCOUNTS}", providers=tuple(chosen),
            gateway_id=GATEWAY, not_after_ms=time.time_ns() // 1_000_000 + 60_000,
        )  # fmt: skip
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests[request.job_id], self._done[request.job_id] = request, done
        body = request.model_dump_json().encode()
        await self._nc.publish(subjects.request_job(SHARD), body)
        try:
            async with asyncio.timeout(JOB_TIMEOUT_S):
                await done
        finally:
            del self._requests[request.job_id], self._done[request.job_id]

    def _on_update(self, message: Msg) -> None:
        update = MatchUpdate.model_validate_json(message.data)
        done = self._done.get(update.job_id)
        if done is None or done.done():
            return
        if update.kind in ("refused", "ended"):
            done.set_exception(Refused(f"{update.kind}: {update.error}"))
        if update.kind != "matched":
            return
        job = SimpleNamespace(request=self._requests[update.job_id], match=update)
        provider = self._by_id[update.provider_id]
        receipt = world.receipt_for(cast(Any, job)).sign(provider.signer)
        result = provider.submit(update.job_id, update.epoch, receipt)
        body = result.model_dump_json().encode()
        publish = self._nc.publish(subjects.submit_result(provider.id), body)
        asyncio.ensure_future(publish)  # noqa: RUF006 - its answer is the acknowledgement

    def _on_ack(self, message: Msg) -> None:
        ack = json.loads(message.data)
        done = self._done.get(ack["job_id"])
        if done is None or done.done():
            return
        if ack["outcome"] == "result_sealed":
            done.set_result(None)
        else:
            done.set_exception(RuntimeError(f"rejected: {ack['reason']}"))


@contextmanager
def _services(folder: Path, dsn: str, url: str) -> Iterator[Groups]:
    """The real matcher and billing; their processes by name."""
    (folder / "dsn").write_text(dsn)
    write_seed_file(folder / "seed", new_seed(secrets.token_bytes(32)))
    with ExitStack() as stack:
        started = {}
        for name in SERVICES:
            prefix = f"COCOON_{name.upper()}_"
            env = {
                f"{prefix}NATS_URL": url, f"{prefix}NATS_SEED_FILE": str(folder / "seed"),
                f"{prefix}POSTGRES_DSN_FILE": str(folder / "dsn"),
            }  # fmt: skip
            started[name] = stack.enter_context(
                process([sys.executable, "-m", f"services.{name}"], env=env)
            )
        for name, child in started.items():
            assert child.stdout is not None
            if not child.stdout.readline():
                raise RuntimeError(f"{name} did not start")
        yield {name: frozenset({child.pid}) for name, child in started.items()}


class World:
    """A platform with so many providers, kept for all rounds."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        self.count = count
        self._providers = [
            world.Provider(f"p{number}", concurrency=CONCURRENCY) for number in range(count)
        ]
        self._folder = stack.enter_context(scratch_folder())
        log = stack.enter_context(postgres(self._folder))
        self._bus = stack.enter_context(nats(self._folder))
        self._dsn, self._stack = log.dsn(), stack
        self._groups: dict[str, frozenset[int]] = {
            "postgres": frozenset({cast(int, log.pid)}),
            "nats": frozenset({cast(int, self._bus.pid)}),
        }

    async def start(self) -> None:
        await prepare_log(self._dsn)
        await _enrol(self._dsn, self._providers)
        nc = await connect(self._bus.url, None, "benchmark", "_INBOX")
        await declare_streams(nc, (subjects.NETWORK_SHARD, SHARD))
        await close(nc)
        self._groups |= self._stack.enter_context(_services(self._folder, self._dsn, self._bus.url))

    async def measure(self, jobs: int) -> Row:
        nc = await connect(self._bus.url, None, "benchmark", "_INBOX")
        players = Players(nc, self._providers)
        await players.listen()
        beating = asyncio.create_task(players.beat())
        try:
            await asyncio.sleep(HEARTBEAT_S * 1.5)
            await players.load(AT_ONCE * 2)  # warm
            await asyncio.sleep(HEARTBEAT_S)  # the books follow
            with Clock(self._groups) as idle:
                await asyncio.sleep(IDLE_S)
            with Clock(self._groups) as clock:
                await players.load(jobs)
                took_s = time.perf_counter() - clock._began_s
                await asyncio.sleep(HEARTBEAT_S / 2)  # the books follow
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await close(nc)
        return job_row(clock, idle, jobs, took_s) | {"refused": float(players.refused)}


def job_row(clock: Clock, idle: Clock, jobs: int, took_s: float) -> Row:
    """CPU a job beyond what the same time costs without jobs; with it, as `gross_us`."""
    share = clock.seconds / idle.seconds
    row = {
        f"{name}_us": (used - idle.cpu_s[name] * share) / jobs * 1e6
        for name, used in clock.cpu_s.items()
    }
    row["cpu_us"] = sum(row.values())
    row["gross_us"] = sum(clock.cpu_s.values()) / jobs * 1e6
    row["jobs_per_s"] = jobs / took_s
    row["idle_ms_per_s"] = sum(idle.cpu_s.values()) / idle.seconds * 1000
    return row


async def _measure(counts: tuple[int, ...], rounds: int, jobs: int) -> Rows:
    found: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        worlds = [World(stack, count) for count in counts]
        for one in worlds:
            await one.start()
        for _ in range(rounds):
            for one in worlds:
                found.setdefault(_name(one.count), []).append(await one.measure(jobs))
    return {name: middle(rows) for name, rows in found.items()}


def providers(*, counts: tuple[int, ...], rounds: int, jobs: int) -> Finding:
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return Finding(uvloop.run(_measure(counts, rounds, jobs)))
