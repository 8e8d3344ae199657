"""How fast a log is replayed: `cocoon replay --verify`, and with `--decisions`.

    .venv/bin/python -m benchmarks.replay [--jobs 40000] [--folder F] [--rounds 3]

Makes a log of so many jobs (five events each) in a Postgres of its own, through the product's
deciders, appender and ledger, then replays it in a process that has done nothing else. The
yardstick, in the same run and in turn with it: plain asyncpg fetches the same rows and hashes
them. Peak memory is what the process grew by. With --folder the log is kept for the next run.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path

import asyncpg
import psutil

from cocoon.contracts.commands import CreditDeposit, OpenAccount
from cocoon.devnet.postgres import PostgresServer
from cocoon.domain.account import AccountState, decide_credit_deposit, decide_open_account
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.migrate import apply_schema
from cocoon.eventlog.read import checkpoint, head, read
from services.billing import decide as billing
from services.billing.ledger import LEDGER_CONSUMER, Ledger
from services.billing.replay import rest_collector
from services.billing.results import LiveJobs
from services.billing.verify import replay_shard
from services.matcher import decide as matcher
from tests.support import job_world as world

SHARD, ACCOUNTS, AT_ONCE, FUNDS = 1, 100, 256, 10**15
COLUMNS = (
    "position, stream, version, type, schema_version, event_id, causation_id, correlation_id,"
    " actor, recorded_at, data, hash"
)


async def make_log(dsn: str, jobs: int) -> None:
    """Accounts with funds, then jobs requested, matched and settled, by their services' items."""
    matching, paying = LogAppender(dsn, SHARD, "matcher"), LogAppender(dsn, SHARD, "billing")
    for appender in (matching, paying):
        await appender.acquire_term()
    for account in range(ACCOUNTS):
        await _open(paying, f"acct_{account}")

    async def job(number: int) -> None:
        name, account = f"job{number}", f"acct_{number % ACCOUNTS}"
        request = world.job_request(name, account=account)
        candidates = tuple(p.candidate() for p in world.PROVIDERS)
        asked = matcher.request_command(
            request, FUNDS, candidates, world.LEASE_TTL_MS, world.hex32(name), world.NOW_MS
        )
        events = decide_request_job(JobState(), asked)
        await matching.append(matcher.request_item(request, asked, events, 2, ""))
        state = fold(events)
        settle = world.settle_command(state)
        paid = decide_settle_result(state, settle)
        await paying.append(billing.settle_item(settle, state, paid, ""))

    for first in range(0, jobs, AT_ONCE):
        await asyncio.gather(*(job(n) for n in range(first, min(jobs, first + AT_ONCE))))
    pool = await create_pool(dsn, "benchmark")
    ledger = Ledger(pool, SHARD, paying.term, LiveJobs())
    await ledger.load()
    async with pool.acquire() as conn:
        async for batch in read(conn, SHARD):
            await ledger.on_events(batch)
    await pool.close()
    for appender in (matching, paying):
        await appender.close()


async def _open(appender: LogAppender, account: str) -> None:
    opening = OpenAccount(account_id=account)
    events = decide_open_account(AccountState(), opening)
    await appender.append(billing.account_item(f"open-{account}", opening, account, events, 0))
    credit = CreditDeposit(
        account_id=account, amount_nanoton=FUNDS, source="dev", reference=f"first-{account}"
    )
    events = decide_credit_deposit(AccountState(opened=True, version=1), credit)
    await appender.append(billing.account_item(f"credit-{account}", credit, account, events, 1))


async def yardstick(conn: asyncpg.Connection) -> int:
    """The same rows by plain asyncpg, each hashed after the one before."""
    prev_hash, count = bytes(32), 0
    sql = f"SELECT {COLUMNS} FROM log.events WHERE shard = {SHARD} ORDER BY position"  # noqa: S608
    async for row in conn.cursor(sql, prefetch=2048):
        fields = tuple(row.values())
        text = "\n".join(map(str, (SHARD, *fields[:11])))
        prev_hash = hashlib.sha256(prev_hash + text.encode()).digest()
        assert prev_hash == fields[11]
        count += 1
    return count


async def verify(conn: asyncpg.Connection, *, decisions: bool = False, part: float = 1.0) -> int:
    last = int((await head(conn, SHARD)).position * part)
    report, _ = await replay_shard(conn, SHARD, 1, last, decisions=decisions)
    assert not report.differences, report.differences
    return report.events


ARMS: dict[str, Callable[[asyncpg.Connection], Awaitable[int]]] = {
    "yardstick": yardstick,
    "a quarter": lambda conn: verify(conn, part=0.25),  # memory is flat: it grows by as much
    "verify": verify,
    "decisions": lambda conn: verify(conn, decisions=True),
}


async def _measure(dsn: str, arm: str) -> None:
    """One arm in this process: prints its figures as JSON."""
    conn = await asyncpg.connect(dsn)
    server = psutil.Process(await conn.fetchval("SELECT pg_backend_pid()"))
    rest_collector()
    before_kib = _peak_kib()
    began_s, cpu_s, server_s = time.perf_counter(), time.process_time(), sum(server.cpu_times()[:2])
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        events = await ARMS[arm](conn)
    figures = {
        "events": events,
        "wall_us": (time.perf_counter() - began_s) / events * 1e6,
        "cpu_us": (time.process_time() - cpu_s) / events * 1e6,
        "postgres_us": (sum(server.cpu_times()[:2]) - server_s) / events * 1e6,
        "grown_mib": (_peak_kib() - before_kib) / 1024,
    }
    await conn.close()
    print(json.dumps(figures))


def _peak_kib() -> int:
    """Of this process since its exec; getrusage would tell its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])


async def _made(dsn: str, jobs: int) -> None:
    await apply_schema(dsn, (0, SHARD))
    conn = await asyncpg.connect(dsn)
    done = await checkpoint(conn, SHARD, LEDGER_CONSUMER)
    await conn.close()
    if not done:
        began_s = time.monotonic()
        await make_log(dsn, jobs)
        print(f"made {jobs} jobs in {time.monotonic() - began_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with nullcontext(chosen.folder) if chosen.folder else tempfile.TemporaryDirectory() as folder:
        server = PostgresServer(Path(folder) / "postgres", chosen.port or 0)
        if chosen.arm:
            asyncio.run(_measure(server.dsn(), chosen.arm))
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder).chmod(0o711)  # the server may run as an account of its own
        server.start()
        try:
            asyncio.run(_made(server.dsn(), chosen.jobs))
            _report(server, Path(folder), chosen.rounds, chosen.arms.split(","))
        finally:
            server.stop("fast")


def _report(server: PostgresServer, folder: Path, rounds: int, arms: list[str]) -> None:
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.replay", "--arm", arm,
                 "--folder", str(folder), "--port", str(server.port)],
                capture_output=True, text=True, check=True, timeout=1200,
            )  # fmt: skip
            found[arm].append(json.loads(done.stdout))
    for arm, runs in found.items():
        print(
            f"{arm:10} {runs[0]['events']:>8} events  {1e6 / _middle(runs, 'wall_us'):>9,.0f}/s"
            f"  {_middle(runs, 'cpu_us'):6.2f} us CPU an event"
            f"  (Postgres {_middle(runs, 'postgres_us'):5.2f})"
            f"  grew {_middle(runs, 'grown_mib'):5.1f} MiB"
        )
    if {"yardstick", "verify"} <= found.keys():
        pairs = zip(found["verify"], found["yardstick"], strict=True)
        ratio = statistics.median(one["cpu_us"] / other["cpu_us"] for one, other in pairs)
        print(f"verify costs {ratio:.2f} of the yardstick's CPU")


def _middle(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


if __name__ == "__main__":
    main()
