"""Ciphertext in SEALED and results through INGRESS, on a real nats-server."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from nats.aio.client import Client

from cocoon.bus import permissions, sealed, streams
from cocoon.bus.ingress import PARKED_S, Incoming, IngressWorker, verdict
from cocoon.bus.publish import publish_durable
from cocoon.contracts import subjects
from cocoon.kernel.errors import Fatal, NotFound, Rejected, TooLarge, Transient, Unavailable
from tests.support.servers import Bus

# ---- SEALED ----


@pytest.mark.parametrize(
    "size", [0, 1, sealed.CHUNK_BYTES, sealed.CHUNK_BYTES + 1, 5 * sealed.CHUNK_BYTES + 3]
)
async def test_a_blob_comes_back_whole(bus: Bus, size: int) -> None:
    mine = bus.providers[0]
    gateway, provider = await bus.connect("gateway"), await bus.connect(mine)
    blob = secrets.token_bytes(size)
    digest = await sealed.put_sealed(provider.jetstream(), mine, blob)
    assert await sealed.put_sealed(provider.jetstream(), mine, blob) == digest
    assert await sealed.get_sealed(gateway, mine, digest) == blob
    large_request = await sealed.put_sealed(gateway.jetstream(), mine, blob)
    assert await sealed.get_sealed(provider, mine, large_request) == blob


async def test_providers_are_kept_apart_in_sealed(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_FETCH_TIMEOUT_S", 0.3)
    mine, other = bus.providers
    provider, gateway = await bus.connect(mine), await bus.connect("gateway")
    digest = await sealed.put_sealed(gateway.jetstream(), other, b"for the other one")
    with pytest.raises(Unavailable):
        await sealed.get_sealed(provider, other, digest)
    with pytest.raises(Unavailable):
        await sealed.put_sealed(provider.jetstream(), other, b"forged", timeout_s=0.3)


async def test_missing_damaged_and_oversized_blobs_are_refused(bus: Bus) -> None:
    mine = bus.providers[0]
    gateway = await bus.connect("gateway")
    with pytest.raises(NotFound):
        await sealed.get_sealed(gateway, mine, "00" * 32)
    for size in ("7", "-1", "x", str(2**40)):
        await publish_durable(
            gateway.jetstream(),
            subjects.sealed_chunk(mine, "00" * 32, 0),
            b"another",
            {"Cocoon-Size": size},
            stream="SEALED",
        )
        with pytest.raises(NotFound):
            await sealed.get_sealed(gateway, mine, "00" * 32)
    with pytest.raises(TooLarge):
        await sealed.put_sealed(gateway.jetstream(), mine, bytes(sealed.MAX_BLOB_BYTES + 1))


async def test_sealed_survives_kill_9_of_nats(bus: Bus) -> None:
    mine = bus.providers[0]
    gateway = await bus.connect("gateway")
    digest = await sealed.put_sealed(gateway.jetstream(), mine, b"ciphertext")
    bus.server.kill()
    bus.server.start()
    again = await bus.connect("gateway")
    assert await sealed.get_sealed(again, mine, digest) == b"ciphertext"


# ---- publishing ----


async def test_a_publish_into_nothing_is_unavailable(bus: Bus) -> None:
    gateway = await bus.connect("gateway")
    with pytest.raises(Unavailable):
        await publish_durable(
            gateway.jetstream(), "cmd.provider.x.run_job", b"x", stream="SEALED", timeout_s=0.3
        )
    with pytest.raises(Fatal, match="larger"):
        await publish_durable(
            gateway.jetstream(), "sealed.x.y.0", bytes(1_048_577), stream="SEALED"
        )


async def test_a_repeated_message_id_is_stored_once(bus: Bus) -> None:
    mine = bus.providers[0]
    provider = await bus.connect(mine)
    sequences = [
        await publish_durable(
            provider.jetstream(), subjects.submit_result(mine), b"r", stream="INGRESS",
            message_id="job-1",
        )
        for _ in range(3)
    ]  # fmt: skip
    assert sequences == [1, 1, 1]


# ---- INGRESS ----


@asynccontextmanager
async def worker(bus: Bus, handler: Callable) -> AsyncIterator[Client]:
    nc = await bus.connect("billing")
    working = asyncio.create_task(
        IngressWorker(
            nc,
            subjects.INGRESS_STREAM,
            permissions.INGRESS_DURABLE,
            handler,
            declare=streams.declare_ingress_consumer,
        ).run()
    )
    try:
        yield nc
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def submit(provider: Client, name: str, *bodies: bytes) -> None:
    for body in bodies:
        await publish_durable(
            provider.jetstream(), subjects.submit_result(name), body, {"Job": "1"}, stream="INGRESS"
        )


async def waiting(bus: Bus) -> tuple[int, int]:
    """(messages in the queue, deliveries not acknowledged)."""
    operator = await bus.connect("operator")
    stream = await streams.api(operator, "STREAM.INFO.INGRESS")
    durable = await streams.api(operator, "CONSUMER.INFO.INGRESS.billing")
    return stream["state"]["messages"], durable["num_ack_pending"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_message_is_settled_by_its_handler_alone(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    mine = bus.providers[0]
    seen: list[Incoming] = []

    async def handler(message: Incoming) -> None:
        seen.append(message)
        if message.body == b"transient" and message.deliveries < 3:
            raise Transient("not yet")
        if message.body == b"rejected":
            raise Rejected("recorded")
        if message.body == b"fatal":
            raise Fatal("an invariant broke")
        if message.body == b"unknown":
            raise ValueError("canary " + message.body.decode())

    provider = await bus.connect(mine)
    await submit(provider, mine, b"ok", b"transient", b"rejected", b"fatal", b"unknown")
    with caplog.at_level(logging.WARNING, "cocoon.bus"):
        async with worker(bus, handler):
            await until(lambda: len(seen) >= 7)
            await asyncio.sleep(0.2)
            assert await waiting(bus) == (2, 2)  # the two parked ones, kept for later
    counts = {message.body: message.deliveries for message in seen}
    assert counts == {b"ok": 1, b"transient": 3, b"rejected": 1, b"fatal": 1, b"unknown": 1}
    assert seen[0].subject == subjects.submit_result(mine)
    assert seen[0].headers["Job"] == "1"
    assert "canary" not in caplog.text


@pytest.mark.parametrize("how", ["a header", "the first line"])
async def test_a_message_that_looks_like_the_servers_word_is_settled_like_any_other(
    bus: Bus, how: str
) -> None:
    mine = bus.providers[0]
    seen: list[bytes] = []

    async def handler(message: Incoming) -> None:
        seen.append(message.body)

    provider = await bus.connect(mine)
    if how == "a header":
        await provider.publish(subjects.submit_result(mine), b"408", headers={"Status": "408"})
    else:
        head = b"NATS/1.0 408 Request Timeout\r\n\r\n"
        sizes = f"{len(head)} {len(head) + 3}"
        line = f"HPUB {subjects.submit_result(mine)} {sizes}\r\n".encode()
        await provider._send_command(line + head + b"408\r\n")
    await submit(provider, mine, b"after")
    async with worker(bus, handler):
        await until(lambda: sorted(seen) == [b"408", b"after"])
        await asyncio.sleep(0.2)
        assert await waiting(bus) == (0, 0)


async def test_an_unsettled_message_comes_again_after_its_worker_died(bus: Bus) -> None:
    stuck = asyncio.Event()

    async def dies(_: Incoming) -> None:
        stuck.set()
        await asyncio.sleep(30)

    provider = await bus.connect(bus.providers[0])
    await submit(provider, bus.providers[0], b"result")
    async with worker(bus, dies):
        await asyncio.wait_for(stuck.wait(), 5)
    assert (await waiting(bus))[0] == 1


async def test_a_result_submitted_again_after_kill_9_of_nats_and_of_the_worker_is_taken(
    bus: Bus,
) -> None:
    """What the queue itself lost or kept does not matter: the provider has it until it is told."""
    mine, seen, stuck = bus.providers[0], [], asyncio.Event()

    async def dies(_: Incoming) -> None:
        stuck.set()
        await asyncio.sleep(30)

    async def takes(message: Incoming) -> None:
        seen.append(message.body)

    await submit(await bus.connect(mine), mine, b"result")
    async with worker(bus, dies):
        await asyncio.wait_for(stuck.wait(), 5)
        bus.server.kill()
    bus.server.start()
    async with worker(bus, takes):
        await submit(await bus.connect(mine), mine, b"result")
        await until(lambda: b"result" in seen)


async def test_results_go_on_after_nats_comes_back_without_them_being_asked_for_again(
    bus: Bus,
) -> None:
    mine = bus.providers[0]
    seen: list[bytes] = []

    async def handler(message: Incoming) -> None:
        seen.append(message.body)

    async with worker(bus, handler):
        provider = await bus.connect(mine)
        await submit(provider, mine, b"before")
        await until(lambda: seen == [b"before"])
        bus.server.kill()
        await asyncio.to_thread(bus.server.start)
        async with asyncio.timeout(10):
            while not provider.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await submit(provider, mine, b"after")
        await until(lambda: b"after" in seen)  # the first may come again: its ack was cut off


async def test_a_worker_whose_queue_is_gone_asks_seldom_and_goes_on_when_it_is_back(
    bus: Bus,
) -> None:
    mine = bus.providers[0]
    seen: list[bytes] = []

    async def handler(message: Incoming) -> None:
        seen.append(message.body)

    async with worker(bus, handler) as nc:
        infra, provider = await bus.connect("infra"), await bus.connect(mine)
        bus.server.kill()
        await asyncio.to_thread(shutil.rmtree, bus.server.jetstream_dir)
        await asyncio.to_thread(bus.server.start)
        async with asyncio.timeout(10):
            while not (nc.is_connected and infra.is_connected):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        before = nc.stats["out_msgs"]
        await asyncio.sleep(1.0)
        assert 1 <= nc.stats["out_msgs"] - before <= 8
        await streams.declare_streams(infra, [])
        await submit(provider, mine, b"later")
        await until(lambda: seen == [b"later"])


async def test_streams_that_are_there_take_the_bounds_of_today(bus: Bus) -> None:
    infra = await bus.connect("infra")
    wanted = {
        subjects.SEALED_STREAM: {"max_msgs": streams.SEALED_MAX},
        subjects.events_stream(1): {"max_msgs": streams.EVENTS_MAX},
        subjects.INGRESS_STREAM: {"max_msgs_per_subject": streams.INGRESS_MAX_OF_ONE},
    }
    for name, bounds in wanted.items():
        config = (await streams.api(infra, f"STREAM.INFO.{name}"))["config"]
        await streams.api(infra, f"STREAM.UPDATE.{name}", config | dict.fromkeys(bounds, 7))
    await streams.declare_streams(infra, (1,))
    for name, bounds in wanted.items():
        config = (await streams.api(infra, f"STREAM.INFO.{name}"))["config"]
        assert bounds.items() <= config.items()


async def test_no_more_are_handled_at_once_than_there_are_workers(bus: Bus) -> None:
    mine = bus.providers[0]
    running, most, done = 0, 0, 0

    async def handler(_: Incoming) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        done += 1

    provider = await bus.connect(mine)
    await submit(provider, mine, *(b"%d" % number for number in range(150)))
    async with worker(bus, handler):
        await until(lambda: done >= 150)
    assert 1 < most <= 64


async def test_a_queue_of_results_is_drained_by_competing_workers(bus: Bus) -> None:
    mine = bus.providers[0]
    seen: list[bytes] = []

    async def handler(message: Incoming) -> None:
        await asyncio.sleep(0.001)
        seen.append(message.body)

    provider = await bus.connect(mine)
    bodies = [b"%d" % number for number in range(200)]
    async with worker(bus, handler), worker(bus, handler):
        await submit(provider, mine, *bodies)
        await until(lambda: len(seen) >= 200)
    assert sorted(seen) == sorted(bodies)


def test_verdicts_are_bounded() -> None:
    assert verdict(None, 1) == ("ack", 0.0)
    assert [verdict(Transient("x"), n)[1] for n in (1, 2, 3, 60)] == [0.25, 0.5, 1.0, 10.0]
    assert verdict(Transient("x", retry_after_s=2), 9) == ("retry", 2.0)
    assert verdict(Rejected("x"), 1)[0] == "drop"
    assert verdict(Fatal("x"), 1) == ("park", PARKED_S)
    assert verdict(RuntimeError("x"), 1) == ("park", PARKED_S)
