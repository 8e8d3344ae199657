"""Real servers and log items for the questions below HTTP: Postgres, NATS, jobs of the deciders."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Groups, cpu_s
from benchmarks.replay import _open as open_account
from cocoon.contracts.envelope import AppendItem
from cocoon.devnet.nats_server import NatsServer
from cocoon.devnet.postgres import PostgresServer
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.migrate import apply_schema
from services.matcher import decide as matcher
from tests.support import job_world as world

SHARD, ACCOUNTS, FUNDS = 1, 100, 10**15
ACCOUNT_VERSION = 2  # opened, credited
EVENTS_A_REQUEST = 3
_numbers = itertools.count(1)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that a server's own account may pass through, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="cocoon-bench-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres(folder: Path) -> Iterator[PostgresServer]:
    """Durable, as `cocoon up` starts it."""
    server = PostgresServer(folder / "postgres")
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")


@contextmanager
def nats(folder: Path) -> Iterator[NatsServer]:
    """Without users: whoever connects may do everything."""
    server = NatsServer(folder / "nats")
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def prepare_log(dsn: str) -> None:
    """The schema, and accounts with funds."""
    await apply_schema(dsn, (0, SHARD))
    paying = LogAppender(dsn, SHARD, "billing")
    await paying.acquire_term()
    for account in range(ACCOUNTS):
        await open_account(paying, f"acct_{account}")
    await paying.close()


def request_item(name: str) -> tuple[AppendItem, JobState]:
    """A new job's request, hold and match in one item, and its state after them."""
    request = world.job_request(name, account=f"acct_{hash(name) % ACCOUNTS}")
    candidates = tuple(p.candidate() for p in world.PROVIDERS)
    asked = matcher.request_command(
        request, FUNDS, candidates, world.LEASE_TTL_MS, world.hex32(name), world.NOW_MS
    )
    events = decide_request_job(JobState(), asked)
    return matcher.request_item(request, asked, events, ACCOUNT_VERSION, ""), fold(events)


def new_name() -> str:
    return f"job{next(_numbers)}"


@dataclass
class Clock:
    """Wall time and CPU of a stretch of work: this process's, and groups of others."""

    groups: Groups

    def __enter__(self) -> Clock:
        self._before = cpu_s(self.groups)
        self._began_s, self._cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began_s
        self.own_cpu_s = time.process_time() - self._cpu_s
        self.cpu_s = {n: t - self._before[n] for n, t in cpu_s(self.groups).items()}
