"""A provider reads what it lost from a real log, newest first and in bounded pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from cocoon.contracts.commands import Candidate, decode_command
from cocoon.contracts.matching import BALANCED, Preferences
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.eventlog import losing
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import connect, create_pool
from cocoon.eventlog.losing import lost_page
from cocoon.eventlog.read import requests_of_jobs
from services.matcher import decide
from services.matcher.store import Secrets
from tests.support.job_world import (
    ALICE,
    BOB,
    MODEL,
    PROVIDERS,
    expire_command,
    hex16,
    job_request,
    request_command,
)  # fmt: skip
from tests.support.servers import Database


@pytest.fixture
async def appender(database: Database) -> AsyncIterator[LogAppender]:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    yield writer
    await writer.close()


@pytest.fixture
async def conn(database: Database) -> AsyncIterator[asyncpg.Connection]:
    opened = await connect(database.dsn("cocoon_billing"), "test")
    yield opened
    await opened.close()


async def asked(appender: LogAppender, job: str, *pool: Candidate, **changes: object) -> JobState:
    command = request_command(
        job, candidates=pool or tuple(p.candidate() for p in PROVIDERS), policy=BALANCED, **changes
    )
    events = decide_request_job(JobState(), command)
    item = decide.request_item(job_request(job), command, events, 0, "")
    assert isinstance(await appender.append(item), Appended)
    return fold(events)


async def test_what_was_lost_is_read_newest_first_and_page_by_page(
    appender: LogAppender, conn: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        await asked(appender, f"job-{number}", ALICE.candidate(running=2), BOB.candidate())
    monkeypatch.setattr(losing, "STEP", 6)  # two jobs
    whole = await lost_page(conn, 1, ALICE.id, since_us=0)
    assert [one.job_id for one in whole.items] == [hex16(f"job-{n}") for n in range(9, -1, -1)]
    assert {one.reason for one in whole.items} == {"filtered:capacity"}
    assert whole.before == 0
    first = await lost_page(conn, 1, ALICE.id, since_us=0, limit=3)
    assert [one.job_id for one in first.items] == [hex16(f"job-{n}") for n in (9, 8, 7, 6)]
    monkeypatch.setattr(losing, "MAX_SCANNED", 12)
    found, before = list(first.items), first.before
    while before:
        page = await lost_page(conn, 1, ALICE.id, since_us=0, before=before)
        found += page.items
        before = page.before
    assert found == list(whole.items)
    assert (await lost_page(conn, 1, BOB.id, since_us=0)).items == ()
    assert (await lost_page(conn, 1, ALICE.id, since_us=2**53)).items == ()


async def test_a_job_that_was_lost_by_failing_it_is_read_with_its_state(
    appender: LogAppender, conn: asyncpg.Connection
) -> None:
    state = await asked(appender, "job")
    assert state.match is not None
    command = expire_command(policy=BALANCED)
    item = decide.expire_item(command, state, decide_expire_lease(state, command), "")
    assert isinstance(await appender.append(item), Appended)
    page = await lost_page(conn, 1, state.match.provider_id, since_us=0)
    assert [one.reason for one in page.items] == ["filtered:tried"]


async def test_a_job_that_was_sealed_to_others_is_lost_by_who_offers_its_model(
    appender: LogAppender, conn: asyncpg.Connection
) -> None:
    await asked(appender, "job", BOB.candidate())
    assert (await lost_page(conn, 1, ALICE.id, since_us=0)).items == ()
    page = await lost_page(conn, 1, ALICE.id, since_us=0, models={MODEL})
    assert [one.reason for one in page.items] == ["not_sealed"]


async def test_the_commands_that_began_jobs_are_found_by_the_jobs(
    appender: LogAppender, conn: asyncpg.Connection
) -> None:
    wishes = Preferences(max_output_nanoton_per_mtok=5_000_000)
    await asked(appender, "wished", preferences=wishes, affinity=hex16("conversation"))
    await asked(appender, "plain")
    found = await requests_of_jobs(conn, 1, [hex16("wished"), hex16("nobody's")])
    assert [(one.job_id, one.preferences) for one in found] == [(hex16("wished"), wishes)]
    assert isinstance(decode_command(found[0].to_stored()), type(found[0]))


async def test_a_secret_is_kept_for_its_shard_and_read_by_the_matcher_alone(
    database: Database,
) -> None:
    pool = await create_pool(database.dsn("cocoon_matcher"), "test", size=1)
    try:
        first, second = Secrets(pool, 1), Secrets(pool, 2)
        await first.keep(b"\x01" * 32)
        await first.keep(b"\x01" * 32)
        await second.keep(b"\x02" * 32)
        assert (await first.load(), await second.load()) == ([b"\x01" * 32], [b"\x02" * 32])
        await first.forget(b"\x01" * 32)
        assert await first.load() == []
    finally:
        await pool.close()
    for role in ("billing", "attestation", "gateway", "reader"):
        other = await connect(database.dsn(f"cocoon_{role}"), "test")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await other.fetch("SELECT * FROM matcher.secrets")
        await other.close()
