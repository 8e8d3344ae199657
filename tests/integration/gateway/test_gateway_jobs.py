"""Sealed jobs through a real gateway: relayed exactly, held for the commit, failed over, ended."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator

import httpx
import pytest

from cocoon.contracts.messages import DispatchReply, DispatchReport, ErrorBody, JobRequest
from tests.support.gateway_world import (
    ACCOUNT,
    EVIDENCE,
    QUOTE,
    Dispatch,
    World,
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


async def test_a_stream_arrives_byte_for_byte_with_its_match(world: World) -> None:
    job_id, sealed = envelope()
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    response = await world.post(sealed, traceparent=trace)
    assert response.status_code == 200
    assert response.content == world.provider.response
    told = response.headers
    assert told["content-type"] == "application/vnd.cocoon.cai1"
    assert told["x-cocoon-job-id"] == job_id
    assert told["x-cocoon-provider"] == world.provider.id
    assert told["x-cocoon-epoch"] == "1"
    assert told["x-cocoon-quote"] == QUOTE.to_canonical().decode()
    assert told["x-cocoon-evidence-id"] == EVIDENCE
    request = world.matcher.requests[0]
    assert request.account_id == ACCOUNT
    assert request.api_key_id == "key_a1"
    assert request.req_hash == hashlib.sha256(sealed).hexdigest()
    dispatch = world.provider.dispatches[0]
    assert dispatch.body == sealed
    assert dispatch.headers["traceparent"][3:35] == "a" * 32
    await until(lambda: world.matcher.reports)
    assert world.matcher.reports == [DispatchReport(job_id=job_id, epoch=1, outcome="began")]


async def test_no_byte_goes_out_before_the_commit(world: World) -> None:
    committed = asyncio.Event()
    sent = asyncio.Event()

    async def match_only(request: JobRequest) -> None:
        await world.matcher.match(request)

    async def run(job: Dispatch) -> None:
        await world.provider.send_all(job)
        await world.provider.nc.flush()
        sent.set()

    world.matcher.on_request = match_only
    world.provider.run = run
    _, sealed = envelope()

    async def ask() -> bytes:
        async with world.http.stream(
            "POST", "/v1/jobs", content=sealed, headers=world.headers()
        ) as response:
            assert committed.is_set()
            return await response.aread()

    asking = asyncio.create_task(ask())
    await sent.wait()
    await world.get("/v1/jobs/" + "0" * 32)  # a whole round trip through the gateway
    assert not asking.done()
    committed.set()
    await world.matcher.commit(world.matcher.requests[0])
    assert await asking == world.provider.response


async def test_a_provider_lost_before_the_first_byte_is_replaced_unseen(world: World) -> None:
    first, second = world.providers

    async def die_half_way(job: Dispatch) -> None:
        await first.frame(job, 0, 100)
        request = world.matcher.requests[0]
        await world.matcher.match(request, 2, provider=1)
        await world.matcher.commit(request, 2, provider=1)

    first.run = die_half_way
    _, sealed = envelope(stream=False)
    response = await world.post(sealed)
    assert response.content == second.response
    assert int(response.headers["content-length"]) == len(second.response)
    assert response.headers["x-cocoon-epoch"] == "2"
    await until(lambda: first.cancels)
    assert first.cancels[0].epoch == 1


async def test_a_provider_lost_after_the_first_byte_truncates_the_body(world: World) -> None:
    async def one_frame(job: Dispatch) -> None:
        await world.provider.frame(job, 0, 100)

    world.provider.run = one_frame
    _, sealed = envelope()
    got = b""
    with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 - the body breaks off
        async with world.http.stream(
            "POST", "/v1/jobs", content=sealed, headers=world.headers()
        ) as response:
            async for chunk in response.aiter_raw():
                got += chunk
                await world.matcher.match(world.matcher.requests[0], 2, provider=1)
    assert got == world.provider.response[:100]
    await until(lambda: world.matcher.cancels)
    assert world.matcher.cancels[0].epoch == 2
    assert world.providers[1].dispatches == []


async def test_a_gap_in_the_frames_is_filled_from_sealed(world: World) -> None:
    async def with_a_hole(job: Dispatch) -> None:
        provider = world.provider
        await provider.frame(job, 0, 100)
        await provider.frame(job, 2000, 3000)
        await provider.last_frame(job, 3000)
        await provider.store()

    world.provider.run = with_a_hole
    for stream in (True, False):
        _, sealed = envelope(stream=stream)
        assert (await world.post(sealed)).content == world.provider.response


async def test_frames_of_stale_epochs_and_other_providers_are_ignored(world: World) -> None:
    other = world.providers[1]

    async def with_noise(job: Dispatch) -> None:
        stale = Dispatch(job.job_id, 7, job.gateway_id, b"", {})
        await world.provider.frame(stale, 0, 50)
        await other.frame(job, 0, 50)
        await other.nc.flush()
        await world.provider.nc.publish(
            f"tok.{job.gateway_id}.{world.provider.id}.{job.job_id}.1", b"\x09short"
        )
        await world.provider.send_all(job)

    world.provider.run = with_noise
    _, sealed = envelope()
    assert (await world.post(sealed)).content == world.provider.response


@pytest.mark.parametrize("outcome", ["busy", "silent"])
async def test_a_busy_or_silent_provider_is_reported_and_the_next_one_answers(
    world: World, outcome: str
) -> None:
    async def next_one(report: DispatchReport) -> None:
        if report.epoch == 1:
            await world.matcher.match(world.matcher.requests[0], 2, provider=1)
            await world.matcher.commit(world.matcher.requests[0], 2, provider=1)

    world.matcher.on_report = next_one
    world.provider.reply = DispatchReply(accepted=False, code="busy") if outcome == "busy" else None
    _, sealed = envelope()
    response = await world.post(sealed)
    assert response.content == world.providers[1].response
    assert world.matcher.reports[0].outcome == outcome


async def test_a_rotated_key_is_answered_with_reseal(world: World) -> None:
    async def give_up(report: DispatchReport) -> None:
        error = ErrorBody(status=503, code="attempts_exhausted", message="nobody is left")
        await world.matcher.tell(world.matcher.requests[0], "ended", epoch=1, error=error)

    world.matcher.on_report = give_up
    world.provider.reply = DispatchReply(accepted=False, code="unknown_key")
    _, sealed = envelope()
    response = await world.post(sealed)
    assert response.status_code == 409
    assert code(response) == "reseal"
    assert world.matcher.reports[0].code == "unknown_key"


@pytest.mark.parametrize(
    ("status", "refusal", "shown", "retry"),
    [
        (402, "insufficient_funds", "insufficient_funds", None),
        (409, "job_id_used", "job_id_used", None),
        (429, "providers_busy", "providers_busy", "3"),
        (503, "no_provider_alive", "no_provider_alive", "1"),
        (503, "no_provider_attestation", "reseal", None),
    ],
)
async def test_the_matchers_refusals_reach_the_client(
    world: World, status: int, refusal: str, shown: str, retry: str | None
) -> None:
    async def refuse(request: JobRequest) -> None:
        more = {"retry_after_s": 3} if status == 429 else {}
        await world.matcher.refuse(request, status, refusal, **more)

    world.matcher.on_request = refuse
    _, sealed = envelope()
    response = await world.post(sealed)
    assert response.status_code == (409 if shown == "reseal" else status)
    assert code(response) == shown
    assert response.headers.get("retry-after") == retry


async def test_a_silent_matcher_is_asked_twice_with_one_command(
    bus: Bus, database: Database
) -> None:
    async with gateway_world(bus, database, match_timeout_s=0.3) as world:

        async def nothing(_request: JobRequest) -> None:
            return

        world.matcher.on_request = nothing
        _, sealed = envelope()
        response = await world.post(sealed)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert len({r.command_id for r in world.matcher.requests}) == 1
        assert len(world.matcher.requests) == 2
        await until(lambda: world.matcher.cancels)


async def test_a_job_without_a_first_byte_ends_at_its_not_after(world: World) -> None:
    async def nothing(_job: Dispatch) -> None:
        return

    world.provider.run = nothing
    _, sealed = envelope(ttl_ms=700)
    response = await world.post(sealed)
    assert response.status_code == 504
    await until(lambda: world.provider.cancels and world.matcher.cancels)
    _, late = envelope(ttl_ms=-1)
    response = await world.post(late)
    assert response.status_code == 504
    assert code(response) == "expired"


async def test_a_client_that_leaves_stops_matcher_and_provider(world: World) -> None:
    async def one_frame(job: Dispatch) -> None:
        await world.provider.frame(job, 0, 100)

    world.provider.run = one_frame
    job_id, sealed = envelope()
    async with world.http.stream(
        "POST", "/v1/jobs", content=sealed, headers=world.headers()
    ) as response:
        async for _ in response.aiter_raw():
            break
    await until(lambda: world.provider.cancels and world.matcher.cancels)
    assert world.provider.cancels[0].job_id == job_id
    assert world.matcher.cancels[0].epoch == 1


async def _flood(world: World, size: int) -> asyncio.Event:
    """Make the provider send `size` bytes in frames and store them; tells when that is done."""
    provider, done = world.provider, asyncio.Event()
    provider.response = secrets.token_bytes(size)

    async def run(job: Dispatch) -> None:
        step = 128 * 1024
        for start in range(0, size - step, step):
            await provider.frame(job, start, start + step)
        await provider.last_frame(job, size - step)
        await provider.store()
        done.set()

    provider.run = run
    return done


async def test_a_slow_reader_gets_the_rest_from_sealed(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, job_buffer_bytes=256 * 1024) as world:
        size = 32 * 128 * 1024  # beyond what the sockets' own buffers take
        done = await _flood(world, size)
        _, sealed = envelope()
        reader, writer = await open_line(world, sealed)
        await done.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        body = b""
        while (length := int(await reader.readline(), 16)) > 0:
            body += await reader.readexactly(length)
            await reader.readline()
        assert body == world.provider.response
        writer.close()
        await writer.wait_closed()


async def test_a_reader_slower_than_the_bound_is_closed(bus: Bus, database: Database) -> None:
    changes = {"job_buffer_bytes": 256 * 1024, "send_timeout_s": 0.3}
    async with gateway_world(bus, database, **changes) as world:
        done = await _flood(world, 96 * 128 * 1024)
        _, sealed = envelope()
        reader, writer = await open_line(world, sealed)
        await done.wait()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):  # noqa: PT012
            await asyncio.sleep(1.0)  # the reader's slowness, not a wait for anything
            while True:
                await reader.readexactly(65536)
        writer.close()


async def test_a_large_envelope_travels_through_sealed(world: World) -> None:
    _, sealed = envelope(body=b'"' + b"x" * 700_000 + b'"')
    assert len(sealed) > 512 * 1024
    response = await world.post(sealed)
    assert response.status_code == 200
    assert world.provider.dispatches[0].body == sealed
    assert "Cocoon-Sealed" in world.provider.dispatches[0].headers


async def test_a_stale_refusal_after_the_match_ends_no_job(world: World) -> None:
    async def match_commit_refuse(request: JobRequest) -> None:
        await world.matcher.match_and_commit(request)
        await world.matcher.refuse(request, 503, "unavailable")

    async def late(job: Dispatch) -> None:
        await world.provider.nc.flush()
        await world.get("/v1/jobs/" + "0" * 32)
        await world.provider.send_all(job)

    world.matcher.on_request = match_commit_refuse
    world.provider.run = late
    _, sealed = envelope()
    response = await world.post(sealed)
    assert response.status_code == 200
    assert response.content == world.provider.response


async def test_a_match_whose_append_fails_each_time_is_refused(world: World) -> None:
    async def match_and_refuse(request: JobRequest) -> None:
        await world.matcher.match(request)
        await world.matcher.refuse(request, 503, "unavailable")

    world.matcher.on_request = match_and_refuse
    _, sealed = envelope()
    response = await world.post(sealed)
    assert (response.status_code, code(response)) == (503, "unavailable")
    assert len(world.matcher.requests) == 2
    await until(lambda: world.provider.cancels)
