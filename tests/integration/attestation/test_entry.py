"""A stranger comes in by its key alone: the real server, the real attestation, real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nacl.signing import SigningKey

from cocoon.bus import accounts, keys, permissions
from cocoon.bus.accounts import GATEWAYS, LOBBY, PLATFORM, READ_SEALED
from cocoon.bus.requests import ask
from cocoon.bus.sealed import put_sealed
from cocoon.contracts import subjects
from cocoon.contracts.messages import BanRequest
from cocoon.kernel.errors import (
    CocoonError,
    ConfigurationError,
    EvidenceRejected,
    Forbidden,
)  # fmt: skip
from services.attestation.main import serve  # noqa: F401 - what runs here
from tests.support.attestation_world import Network
from tests.support.servers import BERTHS, Bus, Database
from tests.support.spies import BLOB, JOB, forms, table
from tests.support.strangers import Stranger, connected, row, until, watching


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path) -> Network:
    return Network(bus, database, tmp_path)


# ---- the way in ----


async def test_a_stranger_enrols_from_the_lobby_and_gets_a_berth_of_its_own(
    network: Network,
) -> None:
    async with network.running():
        one, two = Stranger(network.bus), Stranger(network.bus)
        client = await one.connect()
        assert (await one.enrol(client))["reconnect"] is True
        with pytest.raises(Forbidden, match="connect again") as error:
            await ask(client, subjects.attestation(one.id, "challenge"))
        assert error.value.code == "in_lobby"
        await client.reconnect(10)
        assert "reconnect" not in await one.enrol(client)
        await ask(client, subjects.attestation(one.id, "challenge"))
        await two.entered()
        berths = [(await row(network, who.id))["berth"] for who in (one, two)]
        assert len(set(berths)) == 2
        assert (await network.types()).count("ProviderEnrolled") == 2
        # and its place is its own: a later connection of the same key finds itself there again
        again = await one.connect()
        assert "reconnect" not in await one.enrol(again)
        assert (await row(network, one.id))["berth"] == berths[0]


async def test_the_lobby_lets_one_ask_attestation_in_ones_own_name_and_nothing_else(
    network: Network,
) -> None:
    async with network.running():
        stranger, bus = Stranger(network.bus), network.bus
        client = await stranger.connect()
        promised = table(bus).subjects
        own = [subjects.attestation(stranger.id, verb) for verb in ("enrol", "challenge")]
        foreign = [
            *promised, "$JS.API.INFO", "$SYS.REQ.USER.INFO", permissions.CALLOUT, "_R_.a.b",
            subjects.from_lobby(stranger.id, "enrol"), f"_INBOX_{bus.providers[0]}.x.y",
            subjects.heartbeat(stranger.id), subjects.submit_result(stranger.id),
        ]  # fmt: skip
        assert await stranger.may_not(client, *foreign) == set(foreign)
        assert await stranger.may_not(client, *own) == set()
        wide = [
            ">", "*.>", "rpc.>", "lobby.>", "_INBOX.>", f"_INBOX_{bus.providers[0]}.>",
            f"cmd.provider.{stranger.id}.run_job", subjects.acks(stranger.id),
        ]  # fmt: skip
        assert await stranger.may_not(client, *promised, *wide, hear=True) == {*promised, *wide}


async def test_a_berth_gives_ones_own_subjects_and_nothing_else(network: Network) -> None:
    async with network.running():
        newcomer, bus = Stranger(network.bus), network.bus
        client = await newcomer.entered()
        promised = table(bus)
        foreign = [*promised.subjects, "$JS.API.INFO", "$SYS.REQ.USER.INFO", permissions.CALLOUT,
                   "_R_.a.b", subjects.from_lobby(newcomer.id, "enrol")]  # fmt: skip
        assert await newcomer.may_not(client, *foreign) == set(foreign)
        wide = [">", "*.>", "cmd.>", "ack.>", "tok.>", "_INBOX.>", "_R_.>", "$SYS.>"]
        assert await newcomer.may_not(client, *promised.subjects, *wide, hear=True) == {
            *promised.subjects, *wide,
        }  # fmt: skip
        mine = permissions.provider(newcomer.id, accounts.berth(1))
        own = [item.replace("*", "x") for item in mine.publish]
        assert await newcomer.may_not(client, *own) == set()
        hears = [item.removesuffix(".*").replace(">", "x") for item in mine.subscribe]
        assert await newcomer.may_not(client, *[f"{hears[0]}.x", *hears[1:]], hear=True) == set()


async def test_answers_asked_for_in_another_name_reach_nobody(network: Network) -> None:
    """The permissions in a berth are the provider's; the berth's crossings are everybody's."""
    bus = network.bus
    victim, gateway = bus.providers[0], bus.gateways[0]
    async with network.running(), watching(bus) as field_:
        await field_.spy(PLATFORM, GATEWAYS, LOBBY, bus.berth_of(victim))
        attacker = Stranger(bus)
        client, lobby = await attacker.entered(), Stranger(bus)
        outside = await lobby.connect()
        digest = await put_sealed(client.jetstream(), attacker.id, b"whatever it likes")
        targets = [
            subjects.tokens(gateway, victim, JOB, 1), subjects.heartbeat(victim),
            subjects.submit_result(victim), subjects.attestation(victim, "publish_offer"),
            subjects.attestation(victim, "challenge"), subjects.sealed_chunk(victim, BLOB, 0),
            subjects.run_job(victim), subjects.cancel_job(victim), subjects.acks(victim),
            f"{permissions.inbox_prefix(victim)}.x.y", subjects.match_updates(gateway, "x"),
            subjects.from_lobby(victim, "enrol"), "evt.1.job.x.funds_held",
        ]  # fmt: skip
        stored = f"{READ_SEALED}.{subjects.sealed_chunk(attacker.id, digest, 0)}"
        vehicles = [
            stored, subjects.sealed_chunk(attacker.id, BLOB, 1),
            subjects.submit_result(attacker.id), subjects.heartbeat(attacker.id),
            subjects.attestation(attacker.id, "challenge"),
            subjects.attestation(attacker.id, "enrol"),
        ]  # fmt: skip
        for target in targets:
            for subject in vehicles:
                for form in forms(subject, b"", target):
                    await client.publish(**form)
            for form in forms(subjects.attestation(lobby.id, "enrol"), b"{}", target):
                await outside.publish(**form)
        await client.flush()
        await outside.flush()
        await asyncio.sleep(0.5)
        among_strangers = field_.reached.pop(LOBBY)
        spied = [item for heard in field_.reached.values() for item in heard]
        assert subjects.heartbeat(attacker.id) in spied  # what it may say did arrive
        assert subjects.from_lobby(lobby.id, "enrol") in spied
        assert [item for item in spied if item in targets or f".{victim}" in item] == []
        # in the lobby a stranger can have attestation's answers sent to another one: to a name that
        # nobody hears there, or to his inbox, where only he knows which answer he waits for
        own = (attacker.id, lobby.id)
        assert all(item in targets or any(i in item for i in own) for item in among_strangers)


# ---- who is refused ----


async def test_only_who_signs_this_connections_nonce_by_the_key_he_shows_comes_in(
    network: Network,
) -> None:
    bus, key, other = network.bus, SigningKey.generate(), SigningKey.generate()
    public = bytes(key.verify_key)
    shown = {"nkey": keys.nkey(keys.USER, public)}
    async with network.running():
        assert await connected(bus, shown, key) == b"PONG\r\n"
        refused = b"-ERR 'Authorization Violation'\r\n"
        last = "B" if shown["nkey"].endswith("A") else "A"
        curve, spoilt = 23 << 3, shown["nkey"][:-1] + last
        for login, by, nonce in (
            (shown, other, ""),  # another's signature
            (shown, key, "an earlier nonce"),  # a replayed one
            ({**shown, "sig": ""}, key, ""),
            ({**shown, "sig": "A" * 86}, key, ""),
            ({"nkey": keys.nkey(curve, public)}, key, ""),  # of another curve
            ({"nkey": keys.nkey(keys.ACCOUNT, public)}, key, ""),
            ({"nkey": spoilt}, key, ""),
            ({}, key, ""),  # no key at all
            ({"user": "billing", "pass": "x"}, key, ""),
            ({"nkey": keys.public_nkey(bus.seed_file("billing").read_bytes().strip())}, key, ""),
        ):  # fmt: skip
            assert await connected(bus, login, by, nonce) == refused, login


async def test_a_banned_provider_loses_its_line_and_hears_why_in_the_lobby(
    network: Network,
) -> None:
    async with network.running():
        bad = Stranger(network.bus)
        client = await bad.entered()
        told = await network.platform_ask("ban", BanRequest(provider_id=bad.id))
        assert told["connections"] == 1
        await until(lambda: client.stats["reconnects"] >= 2 and client.is_connected)
        for verb in ("challenge", "publish_offer"):
            with pytest.raises(EvidenceRejected, match="banned"):
                await ask(client, subjects.attestation(bad.id, verb))
        with pytest.raises(EvidenceRejected, match="banned"):
            await bad.enrol(client)
        said = subjects.heartbeat(bad.id)
        assert await bad.may_not(client, said) == {said}
        await network.platform_ask("ban", BanRequest(provider_id=bad.id, lift=True))
        assert (await bad.enrol(client))["reconnect"] is True


async def test_a_login_that_was_being_given_while_its_ban_came_leads_to_the_lobby(
    network: Network,
) -> None:
    import asyncpg

    async with network.running():
        bad = Stranger(network.bus)
        await (await bad.entered()).close()
        holder = await asyncpg.connect(network.database.admin_dsn)
        try:
            async with holder.transaction():  # the berth's row: the login waits for it
                await holder.execute("SELECT FROM attestation.berths FOR UPDATE")
                coming = asyncio.create_task(bad.connect())
                await asyncio.sleep(0.3)
                await network.platform_ask("ban", BanRequest(provider_id=bad.id))
            client = await coming
        finally:
            await holder.close()
        said = subjects.heartbeat(bad.id)
        assert await bad.may_not(client, said) == {said}


async def test_a_plain_line_from_elsewhere_is_refused(network: Network) -> None:
    async with network.running(plain_from=("192.0.2.1",)):
        with pytest.raises(ConfigurationError, match="not encrypted"):
            await Stranger(network.bus).connect(timeout_s=1.0)


# ---- staying ----


async def test_a_login_that_runs_out_is_followed_by_another_one(network: Network) -> None:
    async with network.running(login_s=2):
        lodger = Stranger(network.bus)
        client = await lodger.entered()
        heard: list[bytes] = []

        async def on_ack(message: Any) -> None:
            heard.append(message.data)

        await client.subscribe(subjects.acks(lodger.id), cb=on_ack)
        await client.flush()
        before = client.stats["reconnects"]
        await until(lambda: client.stats["reconnects"] > before and client.is_connected)
        await client.flush()
        billing = await network.bus.connect("billing")
        await billing.publish(subjects.acks(lodger.id), b"still here")
        await until(lambda: heard == [b"still here"])


async def test_while_attestation_is_away_services_come_and_go_and_providers_wait(
    network: Network,
) -> None:
    lodger = Stranger(network.bus)
    async with network.running():
        client = await lodger.entered()
    matcher = await network.bus.connect("matcher")  # needs nobody's word
    await matcher.reconnect(5)
    await matcher.flush()
    await client.force_reconnect()
    await asyncio.sleep(0.5)
    assert not client.is_connected
    async with network.running():
        await until(lambda: client.is_connected, 15)
        assert "reconnect" not in await lodger.enrol(client)


async def test_two_connections_of_one_key_share_its_berth(network: Network) -> None:
    async with network.running():
        lodger = Stranger(network.bus)
        both = [await lodger.entered(), await lodger.entered()]
        heard: list[int] = []
        for number, client in enumerate(both):

            async def on_dispatch(_: Any, number: int = number) -> None:
                heard.append(number)

            await client.subscribe(subjects.run_job(lodger.id), cb=on_dispatch)
            await client.flush()
        gateway = await network.bus.connect("gateway")
        await gateway.publish(subjects.run_job(lodger.id), b"x")
        await until(lambda: sorted(heard) == [0, 1])


async def test_as_many_providers_as_berths_come_in(network: Network) -> None:
    async with network.running():
        everyone = [Stranger(network.bus) for _ in range(BERTHS)]
        for newcomer in everyone:
            await newcomer.entered()
        with pytest.raises(CocoonError, match="no place"):
            await Stranger(network.bus).entered()
