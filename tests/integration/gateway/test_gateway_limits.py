"""The other rows of docs/limits.md, by real HTTP: who is refused, who is cut off, what goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest
from nats.aio.msg import Msg

from cocoon.contracts import subjects
from cocoon.contracts.messages import BalanceRequest, DirectoryRequest, Reply
from services.gateway import keys, store
from tests.support.gateway_world import Dispatch, World, envelope, gateway_world, until
from tests.support.servers import Bus, Database

NO_JOB = "/v1/jobs/" + "0" * 32
BIG = 24 * 1024 * 1024  # beyond what two sockets' own buffers take


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def refused(response: httpx.Response, shown: str) -> None:
    assert (response.status_code, code(response)) == (429, shown)
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1


async def until_let_in(world: World, path: str) -> httpx.Response:
    async with asyncio.timeout(10):
        while (response := await world.get(path)).status_code == 429:
            pass
    return response


@contextlib.asynccontextmanager
async def raw(
    world: World, *requests: bytes, source: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that has sent these requests; `limit` keeps it from reading ahead."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", world.port, limit=4096, local_addr=(source, 0)
    )
    writer.write(b"".join(requests))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def get(world: World, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n\r\n".encode()


def post(world: World, sealed: bytes) -> bytes:
    return (
        f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n"
        f"content-type: application/vnd.cocoon.cai1\r\ncontent-length: {len(sealed)}\r\n\r\n"
    ).encode() + sealed


async def read_to_the_end(reader: asyncio.StreamReader) -> int:
    """Bytes read until the connection ends, in whatever way."""
    size = 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            size += len(data)
    return size


async def one_frame(world: World, job: Dispatch) -> None:
    await world.provider.frame(job, 0, 100)


async def test_all_keys_together_have_a_bound_on_open_jobs(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_jobs=1) as world:
        world.provider.run = lambda job: one_frame(world, job)
        async with raw(world, post(world, envelope()[1])) as (reader, _):
            await reader.readuntil(b"\r\n\r\n")
            world.key = await world.create_key("key_b2")
            refused(await world.post(envelope()[1]), "gateway_full")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({"max_reads_per_key": 1}, "too_many_reads"), ({"max_reads": 1}, "gateway_full")],
)
async def test_reads_have_a_bound_for_a_key_and_for_all(
    bus: Bus, database: Database, changes: dict[str, int], shown: str
) -> None:
    async with gateway_world(bus, database, **changes) as world:
        billing = await bus.connect("billing")
        asked: list[Msg] = []

        async def balance(message: Msg) -> None:
            asked.append(message)

        await billing.subscribe(subjects.billing(1, "balance"), cb=balance)
        await billing.flush()
        waiting = asyncio.create_task(world.get("/v1/balance"))
        await until(lambda: asked)
        refused(await world.get(NO_JOB), shown)
        deleted = await world.http.delete(NO_JOB, headers=world.headers())
        refused(deleted, shown)
        first, world.key = world.key, await world.create_key("key_b2")
        other = await world.get(NO_JOB)
        assert other.status_code == (404 if "max_reads_per_key" in changes else 429)
        world.key = first
        account = BalanceRequest.model_validate_json(asked[0].data).account_id
        told = {"account_id": account, "available_nanoton": "1", "held_nanoton": "0"}
        await asked[0].respond(Reply(ok=True, data=json.dumps(told)).to_canonical())
        assert (await waiting).status_code == 200
        assert (await world.get(NO_JOB)).status_code == 404


async def directory(bus: Bus, pages: int, page_bytes: int, go_on: asyncio.Event) -> None:
    """Attestation, as it answers once `go_on` is set."""
    attestation = await bus.connect("attestation")

    async def answer(message: Msg) -> None:
        await go_on.wait()
        number = int(DirectoryRequest.model_validate_json(message.data).after or "0") + 1
        page = {
            "policy": {}, "log": None, "providers": [{"evidence": "e" * page_bytes}],
            "next": str(number) if number < pages else "",
        }  # fmt: skip
        await message.respond(Reply(ok=True, data=json.dumps(page)).to_canonical())

    await attestation.subscribe(subjects.DIRECTORY_REQUEST, cb=answer)
    await attestation.flush()


async def test_reads_without_a_key_have_a_bound_of_their_own(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_public_reads=1) as world:
        go_on = asyncio.Event()
        await directory(bus, 1, 10, go_on)
        async with raw(world, get(world, "/v1/directory?model=m")) as (reader, _):
            async with asyncio.timeout(10):
                while (full := await world.http.get("/v1/network")).status_code != 429:
                    pass
            refused(full, "gateway_full")
            assert (await world.get(NO_JOB)).status_code == 404  # keys are not in its way
            go_on.set()
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert (await until_let_in(world, "/v1/network")).status_code == 200


async def test_one_address_leaves_public_reads_for_others(bus: Bus, database: Database) -> None:
    changes = {"max_public_reads": 4, "max_public_reads_per_address": 1}
    async with gateway_world(bus, database, **changes) as world:
        go_on = asyncio.Event()
        await directory(bus, 1, 10, go_on)
        asks = get(world, "/v1/directory?model=m")
        async with raw(world, asks) as (first, _):
            async with asyncio.timeout(10):
                while (full := await world.http.get("/v1/network")).status_code != 429:
                    pass
            refused(full, "too_many_reads")
            async with raw(world, asks, source="127.0.0.2") as (second, _):
                go_on.set()
                assert (await first.readline()).startswith(b"HTTP/1.1 200")
                assert (await second.readline()).startswith(b"HTTP/1.1 200")
        assert (await until_let_in(world, "/v1/network")).status_code == 200


async def test_a_slow_reader_of_json_loses_its_connection(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_public_reads=1, send_timeout_s=0.3) as world:
        go_on = asyncio.Event()
        go_on.set()
        await directory(bus, 30, 900_000, go_on)
        async with raw(world, get(world, "/v1/directory?model=m")) as (reader, _):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await until_let_in(world, "/v1/network")
            assert await read_to_the_end(reader) < 27_000_000


async def test_a_slow_reader_of_a_stored_response_loses_its_connection(
    bus: Bus, database: Database
) -> None:
    async with gateway_world(bus, database, max_reads_per_key=1, send_timeout_s=0.3) as world:
        job_id, sealed = envelope()
        await world.post(sealed)
        world.provider.response = secrets.token_bytes(BIG)
        await world.provider.settle(job_id)
        path = f"/v1/jobs/{job_id}/response"
        async with raw(world, get(world, path)) as (reader, _):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            refused(await world.get(NO_JOB), "too_many_reads")
            await until_let_in(world, NO_JOB)
            assert await read_to_the_end(reader) < BIG
        assert (await world.get(path)).content == world.provider.response


async def test_a_slow_reader_of_a_stream_is_cut_and_its_job_cancelled(
    bus: Bus, database: Database
) -> None:
    """What was delivered is settled by the receipt of the provider that is told to stop."""
    async with gateway_world(bus, database, send_timeout_s=0.3, max_jobs_per_key=1) as world:
        stop = asyncio.Event()
        provider = world.provider

        async def endless(job: Dispatch) -> None:
            world.extra["frames"] = asyncio.create_task(frames(job))

        async def frames(job: Dispatch) -> None:
            await provider.frame(job, 0, 100)
            await until(lambda: world.matcher.reports)  # it has gone out
            step, at = 128 * 1024, 100
            while not stop.is_set():
                data = b"\0" + at.to_bytes(8, "big") + bytes(step)
                subject = subjects.tokens(job.gateway_id, provider.id, job.job_id, job.epoch)
                await provider.nc.publish(subject, data)
                at += step
                await asyncio.sleep(0.005)

        provider.run = endless
        job_id, sealed = envelope()
        async with raw(world, post(world, sealed)) as (reader, _):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await until(lambda: provider.cancels and world.matcher.cancels)
            assert provider.cancels[0].job_id == world.matcher.cancels[0].job_id == job_id
            stop.set()
            await read_to_the_end(reader)
        await world.extra["frames"]
        provider.run = provider.send_all
        assert (await world.post(envelope()[1])).status_code == 200  # its place is free


async def test_a_job_has_an_end_whatever_its_provider_does(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, job_timeout_s=0.5) as world:
        world.provider.run = lambda job: one_frame(world, job)
        async with raw(world, post(world, envelope()[1])) as (reader, _):
            await reader.readuntil(b"\r\n\r\n")
            assert not (await reader.read()).endswith(b"0\r\n\r\n")  # cut short, and closed
        await until(lambda: world.provider.cancels and world.matcher.cancels)


async def test_a_job_without_a_first_byte_in_time_is_answered(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, first_byte_timeout_s=0.3) as world:

        async def silent(_job: Dispatch) -> None:
            return

        world.provider.run = silent
        assert (await world.post(envelope()[1])).status_code == 504
        await until(lambda: world.provider.cancels and world.matcher.cancels)


async def test_requests_queued_on_one_connection_are_bounded(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database) as world:
        world.provider.run = lambda job: one_frame(world, job)
        async with raw(world, post(world, envelope()[1])) as (reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(get(world, NO_JOB) * 200)
            await read_to_the_end(reader)
        await until(lambda: world.provider.cancels)


async def test_a_client_that_leaves_with_requests_queued_is_noticed(
    bus: Bus, database: Database
) -> None:
    async with gateway_world(bus, database) as world:
        world.provider.run = lambda job: one_frame(world, job)
        async with raw(world, post(world, envelope()[1])) as (reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(get(world, NO_JOB) * 2)
            await writer.drain()
        await until(lambda: world.provider.cancels and world.matcher.cancels)


async def test_connections_are_bounded_and_idle_ones_closed(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_connections=2, keep_alive_s=0.3) as world:
        await world.http.aclose()
        async with raw(world, get(world, NO_JOB)) as (first, _), raw(world) as (_, _):
            assert (await first.readline()).startswith(b"HTTP/1.1 404")
            async with raw(world, get(world, NO_JOB)) as (third, _):
                assert await read_to_the_end(third) == 0
            await first.readuntil(b"\r\n\r\n")
            assert (await first.read()).endswith(b"}")  # the rest of the answer, then the end


@contextlib.asynccontextmanager
async def keys_locked(database: Database) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(database.admin_dsn)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE gateway.api_keys IN ACCESS EXCLUSIVE MODE")
            yield connection
    finally:
        await connection.close()


async def test_a_look_up_of_a_key_waits_only_so_long(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, key_ttl_s=3600) as world:
        other = await world.create_key("key_b2")
        assert (await world.get(NO_JOB)).status_code == 404  # known from now on
        async with keys_locked(database):
            known, world.key = world.key, other
            late = await world.get(NO_JOB)
            assert late.status_code == 503
            assert int(late.headers["retry-after"]) >= 1
            world.key = known
            assert (await world.post(envelope()[1])).status_code == 200  # served all the while
        world.key = other
        assert (await world.get(NO_JOB)).status_code == 404


async def test_one_look_up_serves_all_who_ask_for_a_key(
    bus: Bus, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOOKUP_S", 10.0)
    monkeypatch.setattr(keys, "MAX_LOOKUPS", 1)
    async with gateway_world(bus, database, max_reads_per_key=100) as world:
        async with keys_locked(database) as connection:
            asking = [asyncio.create_task(world.get(NO_JOB)) for _ in range(20)]
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            async with asyncio.timeout(5):
                while not await connection.fetchval(waits):
                    pass
            first, world.key = world.key, "ck_" + "A" * 43
            assert (await world.get(NO_JOB)).status_code == 503  # nobody else is looked up now
            world.key = first
        assert {(await task).status_code for task in asking} == {404}


async def test_guesses_push_no_live_key_out_of_memory(
    bus: Bus, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_UNKNOWN", 2)
    monkeypatch.setattr(keys, "MAX_CACHED", 2)
    async with gateway_world(bus, database, key_ttl_s=3600) as world:
        assert (await world.get(NO_JOB)).status_code == 404
        live = world.key
        for _ in range(8):
            world.key = "ck_" + secrets.token_urlsafe(32)
            assert (await world.get(NO_JOB)).status_code == 401
        async with keys_locked(database):
            world.key = live
            assert (await world.post(envelope()[1])).status_code == 200
