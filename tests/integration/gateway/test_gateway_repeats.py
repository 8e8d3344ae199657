"""Repeats of a job, lines that leave it and come back: one run, the same bytes, an end in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from cocoon.contracts.messages import JobRequest
from cocoon.kernel.clock import SystemClock
from tests.support.gateway_world import (
    Dispatch,
    World,
    close_line,
    envelope,
    gateway_world,
    open_line,
    until,
)  # fmt: skip
from tests.support.servers import Bus, Database


@pytest.fixture
async def world(bus: Bus, database: Database) -> AsyncIterator[World]:
    async with gateway_world(bus, database) as running:
        yield running


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


async def test_a_repeat_gets_the_same_bytes_from_sealed(world: World) -> None:
    job_id, sealed = envelope()
    first = await world.post(sealed, Idempotency_Key="one")
    await world.provider.settle(job_id)

    async def existing(request: JobRequest) -> None:
        await world.matcher.tell(request, "existing", req_hash=world.matcher.requests[0].req_hash)

    world.matcher.on_request = existing
    second = await world.post(sealed, Idempotency_Key="one")
    assert second.content == first.content == world.provider.response
    assert second.headers["x-cocoon-epoch"] == "1"
    assert world.matcher.requests[0].command_id == world.matcher.requests[1].command_id
    assert len(world.provider.dispatches) == 1

    _, other = envelope()
    third = await world.post(other, Idempotency_Key="one")
    assert third.status_code == 409
    assert code(third) == "idempotency_mismatch"


async def test_a_key_of_an_ended_job_refuses_other_sealed_bytes(world: World) -> None:
    """The matcher remembers the job of a command, but not what an ended job asked."""
    job_id, sealed = envelope()
    await world.post(sealed, Idempotency_Key="one")
    await world.provider.settle(job_id)

    async def existing(request: JobRequest) -> None:
        await world.matcher.tell(request, "existing", job_id=job_id, req_hash="")

    world.matcher.on_request = existing
    _, other = envelope()
    repeat = await world.post(other, Idempotency_Key="one")
    assert repeat.status_code == 409
    assert code(repeat) == "idempotency_mismatch"


async def test_a_repeat_after_its_not_after_still_gets_the_stored_bytes(world: World) -> None:
    job_id, sealed = envelope(ttl_ms=1_500)
    assert (await world.post(sealed)).status_code == 200
    await world.provider.settle(job_id)
    not_after_ms = world.matcher.requests[0].not_after_ms
    await until(lambda: SystemClock().now_ms() > not_after_ms)
    assert (await world.post(sealed)).content == world.provider.response
    assert len(world.matcher.requests) == 1


async def test_a_repeat_of_a_running_job_waits_for_its_response(world: World) -> None:
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def slowly(job: Dispatch) -> None:
        if len(world.provider.dispatches) > 1:
            return  # a repeated dispatch: this one only accepts
        await world.provider.frame(job, 0, 10)
        started.set()

        async def rest() -> None:
            await go_on.wait()
            await world.provider.last_frame(job, 10)
            await world.provider.settle(job.job_id)

        world.extra["rest"] = asyncio.create_task(rest())

    world.provider.run = slowly
    _, sealed = envelope()
    first = asyncio.create_task(world.post(sealed))
    await started.wait()
    second = asyncio.create_task(world.post(sealed))
    await until(lambda: len(world.provider.dispatches) == 2)
    go_on.set()
    assert (await first).content == world.provider.response
    assert (await second).content == world.provider.response
    assert len(world.matcher.requests) == 1
    await world.extra["rest"]


async def test_a_lost_last_frame_is_found_through_the_log(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, stall_s=0.1) as world:

        async def no_end(job: Dispatch) -> None:
            await world.provider.frame(job, 0, 100)
            await world.provider.settle(job.job_id)

        world.provider.run = no_end
        _, sealed = envelope()
        assert (await world.post(sealed)).content == world.provider.response


async def test_a_client_that_comes_back_before_its_first_byte_gets_its_job(
    bus: Bus, database: Database
) -> None:
    async with gateway_world(bus, database, return_grace_s=0.4) as world:

        async def only_accept(_job: Dispatch) -> None:
            return

        world.provider.run = only_accept
        job_id, sealed = envelope()
        _, writer = await open_line(world, sealed)
        await until(lambda: world.provider.dispatches)
        writer.close()
        await writer.wait_closed()
        again = asyncio.create_task(world.post(sealed))
        await until(lambda: len(world.provider.dispatches) == 2)
        await asyncio.sleep(1)  # more than two graces: a job that is waited for goes on
        first = world.provider.dispatches[0]
        await world.provider.send_all(first)
        await world.provider.settle(job_id)
        assert (await again).content == world.provider.response
        assert not world.provider.cancels
        assert not world.matcher.cancels
        assert len(world.matcher.requests) == 1


async def test_a_client_that_left_before_its_first_byte_and_stays_away_stops_its_job(
    bus: Bus, database: Database
) -> None:
    async with gateway_world(bus, database, return_grace_s=0.3) as world:
        still = asyncio.Event()

        async def only_accept(_job: Dispatch) -> None:
            still.set()

        world.provider.run = only_accept
        job_id, sealed = envelope()
        _, writer = await open_line(world, sealed)
        await still.wait()
        writer.close()
        await writer.wait_closed()
        assert not world.provider.cancels
        await until(lambda: world.provider.cancels and world.matcher.cancels)
        assert world.provider.cancels[0].job_id == job_id


async def test_two_lines_of_one_job_that_both_left_stop_it(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, return_grace_s=0.3) as world:

        async def only_accept(_job: Dispatch) -> None:
            return

        world.provider.run = only_accept
        job_id, sealed = envelope()
        _, first = await open_line(world, sealed)
        await until(lambda: world.provider.dispatches)
        _, second = await open_line(world, sealed)
        await until(lambda: len(world.provider.dispatches) == 2)
        await close_line(first)
        await close_line(second)
        await until(lambda: world.provider.cancels and world.matcher.cancels)
        assert world.provider.cancels[0].job_id == world.matcher.cancels[0].job_id == job_id


async def test_a_streaming_job_goes_on_until_its_last_line_leaves(world: World) -> None:
    async def one_frame(job: Dispatch) -> None:
        if len(world.provider.dispatches) == 2:
            await world.provider.frame(job, 0, 100)

    world.provider.run = one_frame
    _, sealed = envelope()
    lines = [await open_line(world, sealed)]
    await until(lambda: world.provider.dispatches)
    lines.append(await open_line(world, sealed))
    for reader, _ in lines:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await close_line(lines[0][1])
    await world.get("/v1/jobs/" + "0" * 32)  # a whole round trip through the gateway
    assert not world.provider.cancels
    assert not world.matcher.cancels
    await close_line(lines[1][1])
    await until(lambda: world.provider.cancels and world.matcher.cancels)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_line_that_is_only_attached_stops_its_own_gateways_job_only(
    bus: Bus, database: Database, elsewhere: bool
) -> None:
    """The gateway restarted since the job was asked; or the job is another gateway's."""
    async with gateway_world(bus, database, return_grace_s=0.2) as world:

        async def only_accept(_job: Dispatch) -> None:
            return

        async def existing(request: JobRequest) -> None:
            asked = request.model_copy(update={"gateway_id": "gw_other"}) if elsewhere else request
            await world.matcher.commit(asked)
            await world.matcher.tell(request, "existing", req_hash=request.req_hash)

        world.provider.run = only_accept
        world.matcher.on_request = existing
        _, sealed = envelope()
        _, writer = await open_line(world, sealed)
        await until(lambda: world.provider.dispatches)
        await close_line(writer)
        if elsewhere:
            await asyncio.sleep(1)  # five graces
            assert not world.provider.cancels
            assert not world.matcher.cancels
        else:
            await until(lambda: world.provider.cancels and world.matcher.cancels)
