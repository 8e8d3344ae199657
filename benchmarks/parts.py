"""What a job is made of: each part alone, in a loop, and how often a job has it.

What the processes cost beyond the sum of these is the services' own code between the parts, and
what it costs to wake a process: the difference between a message among many and one on its own.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvloop
from nacl.signing import VerifyKey

from benchmarks.echo import SUBJECT
from benchmarks.processes import Groups, process, wait_for
from benchmarks.report import Column, Finding, Question, Row, Rows
from benchmarks.servers import FUNDS, Clock, nats, scratch
from cocoon.bus.connection import close, connect
from cocoon.client.lines import Lines
from cocoon.contracts.messages import (
    DispatchReply,
    DispatchReport,
    JobRequest,
    MatchUpdate,
    ResultAck,
    SubmitResult,
)
from cocoon.devnet.ports import free_port
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.batch import prepare
from cocoon.sealing import Profile
from services.billing import decide as billing
from services.matcher import decide as matcher
from tests.support import job_world as jobs
from tests.support import sealing_world as sealing

REPEATS, AT_ONCE = 5, 64
MESSAGES_A_JOB = 16  # of a whole answer under load, by the server's counters; each delivered once
HTTP_A_JOB = 3  # caller to sidecar, sidecar to gateway, provider to engine
BODY = b'{"messages":[{"content":"' + b"How much does the path add? " * 20 + b'","role":"user"}]}'
ANSWER = b"word " * 32
MESSAGE_BYTES = 600

PARTS = Question(
    "parts",
    "What a job is made of: each part alone in a loop, all processes that it takes",
    (
        Column("us", "CPU, us"), Column("times", "times a job"), Column("job_us", "a job, us"),
        Column("alone_us", "on its own, us"),
    ),
    lambda rows: [],
)  # fmt: skip


def parts(*, count: int) -> Finding:
    """`count` rounds of each part, several times; the median."""
    rows = {name: _row(_loop_us(work, count), 1) for name, work in _in_process().items()}
    uvloop.run(_between_processes(rows, count))
    rows["all of them"] = {"job_us": sum(row["job_us"] for row in rows.values())}
    return Finding(rows)


def _row(us: float, times: int) -> Row:
    return {"us": us, "times": times, "job_us": us * times}


def _loop_us(work: Callable[[], object], count: int) -> float:
    found = []
    for _ in range(REPEATS):
        began_s = time.process_time()
        for _ in range(count):
            work()
        found.append((time.process_time() - began_s) / count * 1e6)
    return statistics.median(found)


# ---- in one process ----


def _in_process() -> dict[str, Callable[[], object]]:
    sealed = sealing.sealed(body=BODY, profile=Profile.P0, count=1)
    opened = sealing.opened(sealed.envelope, index=0)
    response = b"".join(sealing.respond(opened, [ANSWER]))

    def read() -> None:
        opener = sealing.opener(sealed, index=0)
        opener.feed(response)
        opener.close()

    return {
        "client: seal to one enclave": lambda: sealing.sealed(
            body=BODY, profile=Profile.P0, count=1
        ),
        "enclave: open": lambda: sealing.opened(sealed.envelope, index=0),
        "enclave: seal one answer, sign its receipt": lambda: sealing.respond(opened, [ANSWER]),
        "client: open it, check its receipt": read,
        **_decisions(),
        "messages: seven contracts to JSON and back": _messages(),
    }


def _decisions() -> dict[str, Callable[[], object]]:
    """What the matcher and billing do with a job, to the bytes that the log is given."""
    request = jobs.job_request()
    candidates = tuple(p.candidate() for p in jobs.PROVIDERS)
    state = jobs.matched_job()
    assert state.match is not None
    provider = jobs.provider_of(state.match)
    receipt = jobs.receipt_for(state).sign(provider.signer)
    result = provider.submit(request.job_id, state.epoch, receipt)
    identity = VerifyKey(bytes(provider.identity.verify_key))

    def match() -> None:
        asked = matcher.request_command(
            request, FUNDS, candidates, jobs.LEASE_TTL_MS, jobs.SEED, jobs.NOW_MS
        )
        events = decide_request_job(JobState(), asked)
        prepare(matcher.request_item(request, asked, events, 2, ""))

    def settle() -> None:
        identity.verify(result.signed_bytes(), bytes.fromhex(result.signature))
        command = billing.settle_command(result)
        prepare(billing.settle_item(command, state, decide_settle_result(state, command), ""))

    return {
        "matcher: decide a match, write its three events": match,
        "billing: check a receipt, write its two events": settle,
    }


def _messages() -> Callable[[], object]:
    state = jobs.matched_job()
    match = state.match
    assert match is not None
    job_id, epoch = match.job_id, match.epoch
    receipt = jobs.receipt_for(state).sign(jobs.provider_of(match).signer)
    update = matcher.matched_update(match)
    every = (
        jobs.job_request(), update, matcher.committed_update(match, 3),
        DispatchReply(accepted=True), DispatchReport(job_id=job_id, epoch=epoch, outcome="began"),
        jobs.provider_of(match).submit(job_id, epoch, receipt),
        ResultAck(job_id=job_id, epoch=epoch, outcome="result_sealed"),
    )  # fmt: skip
    kinds: Sequence[type[Any]] = (
        JobRequest, MatchUpdate, MatchUpdate, DispatchReply, DispatchReport, SubmitResult,
        ResultAck,
    )  # fmt: skip

    def work() -> None:
        for kind, message in zip(kinds, every, strict=True):
            kind.model_validate_json(message.model_dump_json().encode())

    return work


# ---- between processes ----


async def _between_processes(rows: Rows, count: int) -> None:
    body = b"x" * MESSAGE_BYTES
    with scratch() as folder, nats(folder) as server:
        command = [sys.executable, "-m", "benchmarks.echo", "nats", server.url]
        with process(command) as echo:
            assert echo.stdout is not None
            echo.stdout.readline()
            nc = await connect(server.url, None, "parts", "_INBOX.parts")

            async def ask() -> None:
                await nc.request(SUBJECT, body, timeout=5)

            pids = frozenset({echo.pid, server.pid or 0})
            both = await _asked(ask, {"others": pids}, count)  # a question and its answer
            rows["a message of the bus: both ends and NATS"] = {
                **_row(both["us"] / 2, MESSAGES_A_JOB), "alone_us": both["alone_us"] / 2,
            }  # fmt: skip
            await close(nc)
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.echo", "http", str(port)]) as echo:
        wait_for(port)
        lines = Lines(f"http://127.0.0.1:{port}")

        async def post() -> None:
            line = await lines.open("POST", "/", {}, body, read_timeout_s=5)
            while await line.next():
                pass
            line.close()

        found = await _asked(post, {"others": frozenset({echo.pid})}, count)
        rows["an HTTP request and its answer: both ends"] = {
            **_row(found["us"], HTTP_A_JOB), "alone_us": found["alone_us"],
        }  # fmt: skip
        await lines.aclose()


async def _asked(ask: Callable[[], Coroutine[Any, Any, None]], groups: Groups, count: int) -> Row:
    """CPU of one, of all processes: among AT_ONCE, and one at a time with a pause."""
    found: Row = {}

    async def many() -> None:
        for _ in range(count // AT_ONCE + 1):
            await asyncio.gather(*(ask() for _ in range(AT_ONCE)))

    async def single() -> None:
        for _ in range(count // 4):
            await asyncio.sleep(0.01)
            await ask()

    for key, work, done in (
        ("us", many, (count // AT_ONCE + 1) * AT_ONCE),
        ("alone_us", single, count // 4),
    ):
        await work()
        with Clock(groups) as clock:
            await work()
            await asyncio.sleep(0.1)  # the kernel has told the others' time by then
        found[key] = (clock.own_cpu_s + sum(clock.cpu_s.values())) / done * 1e6
    return found
