"""The bound on bytes in memory, by real HTTP: refused in time, given back on every way out."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import httpx
import pytest

from cocoon.contracts.messages import JobRequest
from tests.support.gateway_world import Dispatch, World, envelope, gateway_world, until
from tests.support.servers import Bus, Database

BIG = b'"' + b"x" * 100_000 + b'"'
SIZE = len(envelope(body=BIG)[1])
SPARE = 16 * 1024  # for the answer of 5 KB; less than a body, so that one left behind shows


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def head(world: World, length: int) -> bytes:
    return (
        f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n"
        f"content-type: application/vnd.cocoon.cai1\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


@pytest.fixture
async def narrow(bus: Bus, database: Database) -> AsyncIterator[World]:
    """A gateway with room for one big request."""
    changes = {"buffer_bytes": SIZE + SPARE, "body_timeout_s": 0.3, "match_timeout_s": 0.3}
    async with gateway_world(bus, database, **changes) as world:
        yield world


async def nothing(_request: JobRequest) -> None:
    return


async def all_is_free(world: World) -> None:
    """A request that needs nearly the whole budget comes through, soon."""
    async with asyncio.timeout(10):
        while (response := await world.post(envelope(body=BIG)[1])).status_code == 429:
            assert code(response) == "gateway_full"
    assert response.status_code == 200
    assert response.content == world.provider.response


async def test_a_body_without_room_is_refused_before_it_is_read(narrow: World) -> None:
    waits = asyncio.Event()

    async def hold(_job: Dispatch) -> None:
        waits.set()

    narrow.provider.run = hold
    first = asyncio.create_task(narrow.post(envelope(body=BIG)[1]))
    await waits.wait()
    reader, writer = await asyncio.open_connection("127.0.0.1", narrow.port)
    writer.write(head(narrow, SIZE))  # and not one byte of the body
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after: 1" in answer
    assert b"gateway_full" in await reader.readuntil(b"}}")
    writer.close()
    await writer.wait_closed()

    async def undeclared() -> AsyncIterator[bytes]:
        sealed = envelope(body=BIG)[1]
        for at in range(0, len(sealed), 10_000):
            yield sealed[at : at + 10_000]

    late = await narrow.http.post("/v1/jobs", content=undeclared(), headers=narrow.headers())
    assert (late.status_code, code(late)) == (429, "gateway_full")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    narrow.provider.run = narrow.provider.send_all
    await all_is_free(narrow)


async def test_one_key_leaves_room_for_the_others(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, buffer_per_key_bytes=SIZE + SPARE) as world:
        waits = asyncio.Event()

        async def hold(_job: Dispatch) -> None:
            waits.set()

        world.provider.run = hold
        first = asyncio.create_task(world.post(envelope(body=BIG)[1]))
        await waits.wait()
        refused = await world.post(envelope(body=BIG)[1])
        assert (refused.status_code, code(refused)) == (429, "too_many_bytes")
        assert int(refused.headers["retry-after"]) >= 1
        world.provider.run = world.provider.send_all
        world.key = await world.create_key("key_b2")
        assert (await world.post(envelope(body=BIG)[1])).status_code == 200
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_what_a_refused_request_held_is_given_back(narrow: World) -> None:
    _, sealed = envelope(body=BIG)
    broken = await narrow.post(sealed[:5] + b"\x02" + sealed[6:])  # read whole, then refused
    assert (broken.status_code, code(broken)) == (400, "bad_suite")
    await all_is_free(narrow)
    narrow.matcher.on_request = lambda request: narrow.matcher.refuse(request, 402, "no_funds")
    assert (await narrow.post(sealed)).status_code == 402
    narrow.matcher.on_request = nothing
    assert (await narrow.post(sealed)).status_code == 503
    narrow.matcher.on_request = narrow.matcher.match_and_commit
    await all_is_free(narrow)


async def test_what_a_slow_or_broken_off_body_held_is_given_back(narrow: World) -> None:
    sealed = envelope(body=BIG)[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", narrow.port)
    writer.write(head(narrow, SIZE) + sealed[:90_000])
    assert (await reader.readline()).startswith(b"HTTP/1.1 504")
    writer.close()
    await all_is_free(narrow)
    _, writer = await asyncio.open_connection("127.0.0.1", narrow.port)
    writer.write(head(narrow, SIZE) + sealed[:90_000])
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await all_is_free(narrow)


async def test_what_a_client_that_leaves_held_is_given_back(narrow: World) -> None:
    async def one_frame(job: Dispatch) -> None:
        await narrow.provider.frame(job, 0, 9_000)

    narrow.provider.response = secrets.token_bytes(9_001)
    narrow.provider.run = one_frame
    for stream in (True, False):
        _, sealed = envelope(body=BIG, stream=stream)
        reader, writer = await asyncio.open_connection("127.0.0.1", narrow.port)
        writer.write(head(narrow, len(sealed)) + sealed)
        before = len(narrow.provider.dispatches)
        if stream:
            await reader.readuntil(b"\r\n\r\n")
        else:
            await until(lambda before=before: len(narrow.provider.dispatches) > before)
        writer.close()
        await writer.wait_closed()
        await until(lambda: len(narrow.provider.cancels) == len(narrow.provider.dispatches))
    narrow.provider.run = narrow.provider.send_all
    await all_is_free(narrow)


async def test_an_answer_without_room_comes_from_sealed(bus: Bus, database: Database) -> None:
    """Frames beyond the budget are let go; the stored bytes go out in pieces that fit."""
    async with gateway_world(bus, database, buffer_bytes=2 * 1024 * 1024) as world:
        provider = world.provider
        provider.response = secrets.token_bytes(5 * 1024 * 1024)
        step, settled = 128 * 1024, asyncio.Event()

        async def run(job: Dispatch) -> None:
            size = len(provider.response)
            for start in range(0, size - step, step):
                await provider.frame(job, start, start + step)
            await provider.last_frame(job, size - step)
            await provider.settle(job.job_id)
            settled.set()

        provider.run = run
        for stream in (False, True, False):
            job_id, sealed = envelope(stream=stream)
            assert (await world.post(sealed)).content == provider.response
            await settled.wait()
            settled.clear()
            stored = await world.get(f"/v1/jobs/{job_id}/response")
            assert stored.content == provider.response


async def test_frames_without_room_are_let_go(bus: Bus, database: Database) -> None:
    """Nobody stored this answer: had its frames been kept, it would come."""
    async with gateway_world(bus, database, buffer_bytes=4_000, sealed_timeout_s=0.2) as world:
        lost = await world.post(envelope(stream=False)[1])
        assert (lost.status_code, code(lost)) == (503, "response_lost")


async def test_a_stored_response_needs_room_for_two_pieces(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, buffer_bytes=100_000) as world:
        world.provider.response = secrets.token_bytes(200_000)
        job_id, sealed = envelope()

        settled = asyncio.Event()

        async def frame_and_settle(job: Dispatch) -> None:
            await world.provider.frame(job, 0, 100)
            await until(lambda: world.matcher.reports)  # so the match is in the log
            await world.provider.settle(job.job_id)
            settled.set()

        world.provider.run = frame_and_settle
        asked = asyncio.create_task(world.post(sealed))
        await settled.wait()
        refused = await world.get(f"/v1/jobs/{job_id}/response")
        assert (refused.status_code, code(refused)) == (429, "gateway_full")
        assert refused.headers["retry-after"]
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
