"""Whoever comes, and in whatever number: he keeps nobody out and fills nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from nacl.signing import SigningKey

from cocoon.bus import keys, permissions
from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.devnet.nats_server import LOBBY_PAYLOAD_BYTES, SUBSCRIPTIONS
from cocoon.kernel.errors import (
    CocoonError,
    ConfigurationError,
    RateLimited,
)  # fmt: skip
from cocoon.telemetry.logs import configure_logs
from services.attestation.main import serve  # noqa: F401 - what runs here
from tests.support.attestation_world import Network
from tests.support.servers import Bus, Database
from tests.support.strangers import Stranger, connected, row, run_sql, until


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path) -> Network:
    return Network(bus, database, tmp_path)


async def test_neither_a_stranger_nor_a_provider_fills_the_servers_memory(
    network: Network,
) -> None:
    """With subscriptions of its own inbox, which cost the server some hundred bytes each."""
    bus = network.bus
    async with network.running():
        stranger, lodger = Stranger(bus), Stranger(bus)
        await (await lodger.entered()).close()
        for who in (stranger, lodger):
            key = SigningKey(keys.raw_seed(who.seed))
            login = {"nkey": keys.nkey(keys.USER, bytes(key.verify_key))}
            inbox = permissions.inbox_prefix(who.id)
            lines = [b"SUB %s.%d %d\r\n" % (inbox.encode(), n, n + 1) for n in range(SUBSCRIPTIONS)]
            assert await connected(bus, login, key, then=b"".join(lines)) == b"PONG\r\n"
            lines.append(b"SUB %s.x 999\r\n" % inbox.encode())
            told = await connected(bus, login, key, then=b"".join(lines))
            assert told == b"-ERR 'maximum subscriptions exceeded'\r\n"


async def test_a_stranger_says_little_at_once(network: Network) -> None:
    async with network.running():
        stranger = Stranger(network.bus)
        client = await stranger.connect()
        subject = subjects.attestation(stranger.id, "enrol")
        await client.publish(subject, bytes(LOBBY_PAYLOAD_BYTES))
        await client.flush()
        assert stranger.refused == []
        await client.publish(subject, bytes(LOBBY_PAYLOAD_BYTES + 1))
        await until(lambda: "maximum payload violation" in " ".join(stranger.refused))


async def test_strangers_and_new_providers_come_at_a_bounded_pace(network: Network) -> None:
    slow: dict[str, Any] = {"strangers_per_s": 0.001, "strangers_at_once": 3}
    async with network.running(**slow, enrolments_per_minute=1):
        first, second, third, fourth = (Stranger(network.bus) for _ in range(4))
        client = await first.entered()
        with pytest.raises(RateLimited, match="try again in a minute"):
            await second.entered()
        await third.connect()
        with pytest.raises(ConfigurationError, match="keeps it out"):
            await fourth.connect(timeout_s=0.5)
        await client.reconnect(10)  # who lives here is no stranger
        assert "reconnect" not in await first.enrol(client)


async def test_who_draws_many_keys_at_one_address_keeps_nobody_out_at_another(
    network: Network,
) -> None:
    slow: dict[str, Any] = {"strangers_per_address_per_s": 0.001, "strangers_per_address": 2}
    here, there = "127.0.0.1", "127.0.0.2"
    async with network.running(**slow, plain_from=(here, there)):
        told = []
        for host in (here, here, here, there):
            key = SigningKey.generate()
            login = {"nkey": keys.nkey(keys.USER, bytes(key.verify_key))}
            told.append(await connected(network.bus, login, key, host=host))
    assert told == [b"PONG\r\n"] * 2 + [b"-ERR 'Authorization Violation'\r\n", b"PONG\r\n"]


async def test_a_stranger_does_not_hold_a_place_in_the_lobby_for_long(network: Network) -> None:
    """They are few, and one who keeps them all keeps every newcomer out."""
    async with network.running(lobby_s=1):
        lodger, stranger = Stranger(network.bus), Stranger(network.bus)
        inside, outside = await lodger.entered(), await stranger.connect()
        moved = inside.stats["reconnects"]
        await until(lambda: outside.stats["reconnects"] >= 1)
        assert "expired" in " ".join(stranger.refused)
        assert inside.stats["reconnects"] == moved


async def test_a_stranger_may_ask_only_so_often(network: Network) -> None:
    lines = io.StringIO()
    undo = configure_logs("test", "info", lines)
    try:
        async with network.running():
            stranger = Stranger(network.bus)
            client = await stranger.connect()
            codes = []
            for _ in range(100):
                try:
                    await ask(client, subjects.attestation(stranger.id, "challenge"))
                except CocoonError as error:
                    codes.append(error.code)
            assert codes[:20] == ["in_lobby"] * 20
            assert codes.count("too_many_requests") > 50
    finally:
        undo()
    logged = lines.getvalue().count("request_refused")
    assert logged == codes.count("in_lobby")  # nor does he fill the log


async def test_berths_that_were_left_long_ago_are_given_to_newcomers_and_no_others(
    network: Network,
) -> None:
    async with network.running(berths=2):
        one, two, three = (Stranger(network.bus) for _ in range(3))
        leaving = await one.entered()
        await two.entered()
        client = await three.connect()
        with pytest.raises(RateLimited, match="no place for another provider"):
            await three.enrol(client)
        await leaving.close()
    assert (await network.types()).count("ProviderEnrolled") == 2  # a refusal writes nothing
    long_ago = (
        "UPDATE attestation.berths SET held_until_ms = 1000, taken_ms = 1000 WHERE provider_id = $1"
    )
    await run_sql(network, long_ago, one.id)
    async with network.running(berths=2):
        freed = (await row(network, one.id))["berth"]
        await three.entered()
        assert (await row(network, three.id))["berth"] == freed
        late = await one.connect()  # back after all: it is known, and has no place
        with pytest.raises(RateLimited):
            await one.enrol(late)
        assert (await two.enrol(await two.connect())).get("reconnect") is None


async def test_a_berth_that_was_just_given_is_not_given_to_the_next_who_asks(
    network: Network,
) -> None:
    async with network.running(berths=1):
        one, two = Stranger(network.bus), Stranger(network.bus)
        client, other = await one.connect(), await two.connect()
        await one.enrol(client)
        with pytest.raises(RateLimited, match="no place"):
            await two.enrol(other)
        await client.reconnect(10)
        assert "reconnect" not in await one.enrol(client)
