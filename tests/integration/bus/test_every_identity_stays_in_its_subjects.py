"""Every identity tries every subject on a real nats-server; what happens is the documented table.

Then what permissions cannot see: answers that an attacker asks for in another's name. A spy that
hears everything in the attacked accounts shows that nothing comes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator
from itertools import product

import pytest
from nacl.signing import SigningKey
from nats.aio.msg import Msg

from cocoon.bus import connection, keys, permissions, streams
from cocoon.bus.accounts import GATEWAYS, OPERATORS, PLATFORM, READ_SEALED
from cocoon.bus.sealed import put_sealed
from cocoon.contracts import subjects
from cocoon.kernel.errors import ConfigurationError
from tests.support.servers import Bus
from tests.support.spies import (
    BLOB,
    JOB,
    Field,
    answering,
    forms,
    identities,
    others,
    reached,
    table,
)  # fmt: skip


@pytest.fixture
async def field_(bus: Bus) -> AsyncIterator[Field]:
    made = Field(bus)
    yield made
    await made.close()


# ---- plain tries ----


async def test_every_identity_publishes_what_the_table_says_and_it_arrives_there_only(
    field_: Field,
) -> None:
    promised, heard = table(field_.bus), set()
    everyone = {name: await field_.plain(name) for name in identities(field_.bus)}
    for who, subject in promised.hear:

        async def on_message(message: Msg, who: str = who) -> None:
            heard.add((message.data.decode(), message.subject, who))

        await everyone[who].nc.subscribe(subject, cb=on_message)
        await everyone[who].nc.flush()
    for who, tried in everyone.items():
        refused = await tried.refused(*promised.subjects, body=who.encode())
        assert {(who, s) for s in promised.subjects if s not in refused} == {
            pair for pair in promised.publish if pair[0] == who
        }, who
    expected = {
        (speaker, subject, hearer)
        for speaker, subject in promised.publish
        for hearer, what in promised.hear
        if what == subject
    }
    async with asyncio.timeout(10):
        while len(heard) < len(expected):  # noqa: ASYNC110 - of many connections
            await asyncio.sleep(0.01)
    for tried in everyone.values():
        await tried.nc.flush()
    assert heard == expected
    operator = await field_.bus.connect("operator")
    for stream in ("EVENTS_1", "INGRESS", "SEALED"):
        info = await streams.api(operator, f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        kept = set(info["state"].get("subjects") or ())
        assert kept == {s for _, s in promised.publish if promised.stored.get(s) == stream}


async def test_every_identity_hears_what_the_table_says_and_its_own_inbox(field_: Field) -> None:
    promised, everyone = table(field_.bus), identities(field_.bus)
    inboxes = {f"{permissions.inbox_prefix(name)}.x.y": name for name in everyone}
    wide = (
        ">", "*.>", "evt.>", "evt.1.>", "cmd.>", "cmd.provider.>", "cmd.platform.>", "ack.>",
        "ack.provider.*", "tok.>", "tok.*.>", "mat.>", "mat.*.*", "sealed.>", "hb.>", "rpc.>",
        "$JS.>", "$JS.API.>", "$JS.ACK.>", "$SYS.>", "_INBOX.>", "_R_.>",
    )  # fmt: skip
    for who in everyone:
        tried = await field_.plain(who)
        refused = await tried.refused(*promised.subjects, *inboxes, *wide, subscribe=True)
        allowed = {*promised.subjects, *inboxes, *wide} - refused
        mine = {subject for name, subject in promised.hear if name == who}
        assert allowed == mine | {inbox for inbox, name in inboxes.items() if name == who}, who


# verb of JetStream's API -> who may use it; the relay runs beside billing
API: dict[str, set[str]] = {
    "STREAM.CREATE.EVENTS_1": {"billing", "infra"},
    "STREAM.DELETE.EVENTS_1": {"billing"},
    "STREAM.MSG.GET.EVENTS_1": {"billing"},
    **{f"STREAM.{verb}.{stream}": set() for stream in ("INGRESS", "SEALED")
       for verb in ("DELETE", "PURGE", "MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE")},
    **{f"STREAM.{verb}.EVENTS_1": set() for verb in ("PURGE", "MSG.DELETE", "SNAPSHOT")},
    **{f"STREAM.UPDATE.{stream}": {"infra"} for stream in ("EVENTS_1", "INGRESS", "SEALED")},
    "CONSUMER.CREATE.EVENTS_1.x": {"matcher", "billing", "attestation", "infra"},
    "CONSUMER.CREATE.INGRESS.x": {"infra"},
    "CONSUMER.CREATE.SEALED.x": {"infra"},
    "CONSUMER.DURABLE.CREATE.INGRESS.billing": {"billing", "infra"},
    "CONSUMER.DELETE.INGRESS.billing": set(),
    "CONSUMER.MSG.NEXT.INGRESS.billing": {"billing"},
    "CONSUMER.MSG.NEXT.EVENTS_1.x": set(),
    "DIRECT.GET.SEALED": set(),
    "DIRECT.GET.SEALED.evt.1.job": set(),
    "DIRECT.GET.EVENTS_1.evt.1.job": set(),
    "ACCOUNT.PURGE.PLATFORM": set(),
}  # fmt: skip


async def test_jetstreams_api_and_the_servers_own_subjects_are_for_those_who_need_them(
    field_: Field,
) -> None:
    bus = field_.bus
    owners = {f"$JS.API.{verb}": able for verb, able in API.items()}
    for provider in bus.providers:
        chunk = subjects.sealed_chunk(provider, BLOB, 0)
        owners[f"{READ_SEALED}.{chunk}"] = {provider, *bus.gateways}
    owners |= {
        "$JS.ACK.INGRESS.billing.1.1.1.1.0": {"billing"},
        "$SYS.REQ.SERVER.PING": set(),
        "$SYS.REQ.ACCOUNT.PLATFORM.PURGE": set(),
        "$SYS.REQ.ACCOUNT.BERTH_0001.CONNZ": {"entry"},
        "$SYS.REQ.SERVER.ABC.KICK": {"entry"},
        "$SYS.REQ.SERVER.ABC.RELOAD": set(),
        "$SYS.REQ.CLAIMS.UPDATE": set(),
        permissions.CALLOUT: set(),
    }
    answered = {"billing", "attestation"}  # they answer what came over a crossing
    owners["_R_.aaaaaa.bbbbbb"] = answered
    for name in identities(bus):
        owners[f"{permissions.inbox_prefix(name)}.x.y"] = set()
    for who in identities(bus):
        tried = await field_.plain(who)
        forbidden = {subject for subject, able in owners.items() if who not in able}
        assert await tried.refused(*forbidden) == forbidden, who
    for who in identities(bus):
        tried = await field_.plain(who)
        allowed = {
            s for s, able in owners.items() if who in able and "DELETE" not in s
        }  # a deletion would be carried out
        assert await tried.refused(*allowed) == set(), who


async def test_nobody_comes_in_without_a_key_that_the_network_knows(field_: Field) -> None:
    bus = field_.bus
    stranger = bus.folder / "stranger.seed"
    keys.write_seed_file(stranger, keys.new_seed(secrets.token_bytes(32)))
    with pytest.raises(ConfigurationError, match="does not know"):
        await connection.connect(bus.server.url, None, "stranger", "_INBOX_stranger", timeout_s=4)
    billing = keys.public_nkey(keys.read_seed_file(bus.seed_file("billing")))
    by_stranger = SigningKey(keys.raw_seed(keys.read_seed_file(stranger)))
    for login in (
        {}, {"user": "billing", "pass": "billing"}, {"user": billing, "pass": ""},
        {"auth_token": "cocoon"}, {"nkey": billing}, {"nkey": billing, "sig": ""},
        {"nkey": billing, "user": "billing", "pass": "x"}, {"jwt": "a.b.c", "nkey": billing},
    ):  # fmt: skip
        for signed in (False, True):
            assert b"Authorization Violation" in await answer_to(bus, login, by_stranger, signed)


async def answer_to(bus: Bus, login: dict[str, str], key: SigningKey, signed: bool) -> bytes:
    """What the server says to a CONNECT of our own making, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bus.server.port)
    info = json.loads((await reader.readline()).removeprefix(b"INFO "))
    sent = {"verbose": False, "pedantic": False, "lang": "x", "version": "1", **login}
    if signed:
        signature = key.sign(info["nonce"].encode()).signature
        sent["sig"] = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    writer.write(b"CONNECT %s\r\nPING\r\n" % json.dumps(sent).encode())
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


# ---- answers asked for in another's name ----


async def test_a_provider_can_have_nothing_sent_to_a_subject_that_is_not_its_own(
    field_: Field,
) -> None:
    mine, other = field_.bus.providers
    await field_.spy(PLATFORM, GATEWAYS, OPERATORS, field_.bus.berth_of(other))
    attacker = await field_.plain(mine)
    digest = await put_sealed(attacker.nc.jetstream(), mine, b"whatever the provider likes")
    stored = f"{READ_SEALED}.{subjects.sealed_chunk(mine, digest, 0)}"
    gateway = field_.bus.gateways[0]
    targets = others(field_, mine)
    enrol = subjects.attestation(mine, "enrol")
    vehicles = (
        (stored, b""), (stored, b'{"batch":8,"multi_last":["sealed.>"]}'),
        (subjects.sealed_chunk(mine, BLOB, 1), b"x"), (subjects.submit_result(mine), b"x"),
        (enrol, b"{}"), (subjects.heartbeat(mine), b"{}"),
        (subjects.tokens(gateway, mine, JOB, 1), b"x"),
        # and what it may not even ask
        ("$JS.API.CONSUMER.MSG.NEXT.INGRESS.billing", b""), ("$JS.API.INFO", b""),
        ("$SYS.REQ.USER.INFO", b""),
    )  # fmt: skip
    async with answering(field_, "attestation", "rpc.attestation.>"):
        for target in targets:
            for subject, body in vehicles:
                for form in forms(subject, body, target):
                    await attacker.nc.publish(**form)
            consumer = {"name": "x", "deliver_subject": target, "ack_policy": "none"}
            for stream in ("SEALED", "INGRESS", "EVENTS_1"):
                await attacker.nc.publish(
                    f"$JS.API.CONSUMER.CREATE.{stream}.x",
                    json.dumps({"stream_name": stream, "config": consumer}).encode(),
                )
        await field_.settled(attacker)
    assert enrol in field_.reached[PLATFORM]  # the requests themselves came through
    marker = subjects.match_updates(gateway, JOB)
    arrived = reached(field_, field_.reached, [t for t in targets if t != marker])
    assert arrived == []
    assert field_.reached[field_.bus.berth_of(other)] == []
    info = await streams.api(await field_.bus.connect("operator"), "STREAM.INFO.EVENTS_1")
    assert info["state"]["last_seq"] == 0


async def test_a_gateway_can_have_nothing_sent_into_the_platform_or_to_a_provider(
    field_: Field,
) -> None:
    """Also when a provider plays along, and says where the gateway wants what it may not itself."""
    gateway, (friend, victim) = field_.bus.gateways[0], field_.bus.providers
    theirs = field_.bus.berth_of(victim)
    await field_.spy(PLATFORM, theirs)
    attacker = await field_.plain(gateway)
    digest = await put_sealed(attacker.nc.jetstream(), friend, b"whatever the gateway likes")
    marker = subjects.match_updates(gateway, JOB)
    friends = {subject for who, subject in table(field_.bus).publish if who == friend}
    targets = [t for t in others(field_, gateway) if t != marker and t not in friends]
    vehicles = (
        (f"{READ_SEALED}.{subjects.sealed_chunk(friend, digest, 0)}", b""),
        (subjects.sealed_chunk(friend, BLOB, 1), b"x"),
        (subjects.run_job(friend), b"x"), (subjects.cancel_job(friend), b"x"),
        (subjects.request_job(1), b"{}"), (subjects.DIRECTORY_REQUEST, b"{}"),
        (subjects.billing(1, "balance"), b"{}"),
        ("$JS.API.CONSUMER.MSG.NEXT.INGRESS.billing", b""), ("$SYS.REQ.USER.INFO", b""),
    )  # fmt: skip
    async with (
        answering(field_, friend, subjects.run_job(friend)),
        answering(field_, "attestation", "rpc.attestation.>"),
        answering(field_, "billing", "rpc.billing.>"),
    ):
        for target in targets:
            for subject, body in vehicles:
                for form in forms(subject, body, target):
                    await attacker.nc.publish(**form)
        await field_.settled(attacker)
    assert subjects.DIRECTORY_REQUEST in field_.reached[PLATFORM]
    assert reached(field_, (PLATFORM, theirs), targets) == []
    info = await streams.api(await field_.bus.connect("operator"), "STREAM.INFO.EVENTS_1")
    assert info["state"]["last_seq"] == 0


async def test_an_operator_can_have_nothing_sent_to_a_subject_that_is_not_his(
    field_: Field,
) -> None:
    """Not by the services that answer him, and not by JetStream's own answers."""
    bus = field_.bus
    await field_.spy(PLATFORM, GATEWAYS, *map(bus.berth_of, bus.providers))
    operator = await field_.plain("operator")
    marker = subjects.match_updates(bus.gateways[0], JOB)
    targets = [target for target in others(field_, "operator") if target != marker]
    vehicles = (
        subjects.DIRECTORY_REQUEST, subjects.billing(1, "balance"), subjects.gateway_keys("list"),
        "$JS.API.INFO", "$JS.API.STREAM.INFO.SEALED", "$JS.API.CONSUMER.INFO.INGRESS.billing",
    )  # fmt: skip
    async with (
        answering(field_, "attestation", "rpc.attestation.>"),
        answering(field_, "billing", "rpc.billing.>"),
        answering(field_, bus.gateways[0], "rpc.gateway.keys.*"),
    ):
        for target, subject in product(targets, vehicles):
            for form in forms(subject, b"", target):
                await operator.nc.publish(**form)
        await field_.settled(operator)
        for verb in (*vehicles[:3], "$JS.API.INFO"):
            assert (await operator.nc.request(verb, b"", timeout=2)).data  # the true way works
    assert reached(field_, field_.reached, targets) == []


async def test_what_a_service_has_jetstream_send_to_another_is_dropped_there(
    field_: Field,
) -> None:
    """The server lets whoever follows the events name any subject to deliver them to."""
    bus = field_.bus
    billing, attestation = await bus.connect("billing"), await bus.connect("attestation")
    await billing.jetstream().publish(f"evt.1.job.{JOB}.job_requested", b'{"forged":true}')
    heard: list[tuple[str, bytes]] = []
    enough = asyncio.Event()

    def on_message(message: Msg) -> None:
        heard.append((message.subject, message.data))
        if message.data == b"true":
            enough.set()

    target = subjects.heartbeat(bus.providers[0])
    await attestation.subscribe_direct(target, on_message)
    plain = await field_.plain("matcher")
    forged = asyncio.Event()

    async def on_plain(message: Msg) -> None:
        if message.data == b'{"forged":true}':
            forged.set()

    await plain.nc.subscribe(target, cb=on_plain)
    await plain.nc.flush()
    await attestation.flush()
    config = {
        "name": "x", "deliver_subject": target, "deliver_policy": "all", "ack_policy": "none",
        "mem_storage": True,
    }  # fmt: skip
    await streams.api(
        await bus.connect("matcher"), "CONSUMER.CREATE.EVENTS_1.x",
        {"stream_name": "EVENTS_1", "config": config},
    )  # fmt: skip
    async with asyncio.timeout(5):
        await forged.wait()  # a client without the guard does get it
        provider = await bus.connect(bus.providers[0])
        await provider.publish(target, b"true")
        await enough.wait()
    assert heard == [(target, b"true")]
