"""Who may say and hear what, enforced by a real nats-server."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

from cocoon.bus import connection, keys, permissions, streams
from cocoon.bus.sealed import get_sealed, put_sealed
from cocoon.contracts import subjects
from cocoon.devnet.nats_server import NatsUser
from cocoon.kernel import ids
from cocoon.kernel.errors import ConfigurationError, NotFound, Unavailable
from tests.support.servers import SHARDS, Bus

JOB = "0f" * 16


async def heard(listener: Client, speaker: Client, hear: str, say: str) -> bool:
    """Whether a message published by `speaker` on `say` reaches `listener` subscribed to `hear`."""
    arrived = asyncio.Event()

    async def on_message(_: object) -> None:
        arrived.set()

    subscription = await listener.subscribe(hear, cb=on_message)
    await listener.flush()
    await speaker.publish(say, b"x")
    await speaker.flush()
    try:
        await asyncio.wait_for(arrived.wait(), 0.3)
    except TimeoutError:
        return False
    finally:
        await subscription.unsubscribe()
    return True


async def test_a_provider_reaches_the_platform_on_its_own_subjects(bus: Bus) -> None:
    mine = bus.providers[0]
    provider, gateway = await bus.connect(mine), await bus.connect("gateway")
    token = subjects.tokens(bus.gateways[0], mine, JOB, 1)
    assert await heard(gateway, provider, f"tok.{bus.gateways[0]}.>", token)
    matcher = await bus.connect("matcher")
    assert await heard(matcher, provider, subjects.HEARTBEATS, subjects.heartbeat(mine))
    assert await heard(provider, gateway, f"cmd.provider.{mine}.>", subjects.run_job(mine))
    billing = await bus.connect("billing")
    assert await heard(provider, billing, subjects.acks(mine), subjects.acks(mine))
    attestation = await bus.connect("attestation")
    assert await heard(
        attestation, provider, "rpc.attestation.>", subjects.attestation(mine, "enrol")
    )


async def test_a_provider_answers_a_dispatch_once_and_nothing_else(bus: Bus) -> None:
    mine = bus.providers[0]
    provider, gateway = await bus.connect(mine), await bus.connect("gateway")

    async def accept(message) -> None:
        await message.respond(b"accepted")

    await provider.subscribe(subjects.run_job(mine), cb=accept)
    await provider.flush()
    reply = await gateway.request(subjects.run_job(mine), b"envelope", timeout=2)
    assert reply.data == b"accepted"
    inbox = gateway.new_inbox()
    assert not await heard(gateway, provider, inbox, inbox)  # nobody asked


async def test_only_billing_publishes_events(bus: Bus) -> None:
    event = "evt.1.job.x.funds_held"
    for name in (*permissions.ROLES, "gateway", bus.providers[0]):
        speaker = await bus.connect(name)
        if name == "billing":
            await speaker.jetstream().publish(event, b"{}", timeout=2)
        else:
            with pytest.raises((NatsTimeoutError, NoRespondersError)):
                await speaker.request(event, b"{}", timeout=0.2)
    info = await streams.api(await bus.connect("operator"), "STREAM.INFO.EVENTS_1")
    assert info["state"]["messages"] == 1


def test_the_table_lets_only_billing_publish_events_and_only_infra_declare() -> None:
    table = {name: make(SHARDS) for name, make in permissions.ROLES.items()}
    table["prov_x"], table["gw1"] = permissions.provider("prov_x"), permissions.gateway("gw1")
    for name, allowed in table.items():
        publishes = allowed.publish
        assert any(p.startswith("evt.") for p in publishes) == (name == "billing")
        assert any("STREAM.UPDATE" in p for p in publishes) == (name == "infra")
        assert not {">", "*", "$JS.>", "$JS.API.>"} & {*publishes, *allowed.subscribe}
        inboxes = [s for s in allowed.subscribe if s.startswith("_INBOX")]
        assert inboxes == [f"_INBOX_{name}.>"]


async def test_api_refuses_what_a_role_may_not_do(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "API_TIMEOUT_S", 0.3)  # the server tells only the error callback
    gateway = await bus.connect("gateway")
    for verb in ("STREAM.DELETE.EVENTS_1", "STREAM.PURGE.EVENTS_1", "STREAM.UPDATE.SEALED"):
        with pytest.raises(Unavailable):
            await streams.api(gateway, verb)
    with pytest.raises(NotFound):
        await streams.api(await bus.connect("operator"), "STREAM.INFO.NOTHING")


async def test_unknown_user_and_no_user_are_refused(bus: Bus) -> None:
    stranger = bus.folder / "stranger.seed"
    keys.write_seed_file(stranger, keys.new_seed(secrets.token_bytes(32)))
    for seed_file in (stranger, None):
        with pytest.raises(ConfigurationError, match="does not know"):
            await connection.connect(bus.server.url, seed_file, "stranger", "_INBOX_stranger")
    bus.server.kill()
    with pytest.raises(Unavailable):
        await connection.connect(bus.server.url, stranger, "s", "_INBOX_s", timeout_s=0.3)


async def test_a_user_added_to_a_running_server_is_let_in(bus: Bus) -> None:
    seed = keys.new_seed(secrets.token_bytes(32))
    path = bus.folder / "late.seed"
    keys.write_seed_file(path, seed)
    late, gateway = ids.provider_id(keys.raw_public(seed)), await bus.connect("gateway")
    user = NatsUser(keys.public_nkey(seed), permissions.provider(late))
    await asyncio.to_thread(bus.server.set_users, [*bus.server.users, user])
    client = await connection.connect(bus.server.url, path, late, permissions.inbox_prefix(late))
    bus.opened.append(client)
    # requests from the new account, to it, and those of an old one
    for provider, name in ((client, late), (await bus.connect(bus.providers[0]), bus.providers[0])):
        digest = await put_sealed(provider.jetstream(), name, b"ciphertext")
        assert await get_sealed(provider, name, digest) == b"ciphertext"

        async def accept(message: Msg) -> None:
            await message.respond(b"accepted")

        await provider.subscribe(subjects.run_job(name), cb=accept)
        await provider.flush()
        assert (await gateway.request(subjects.run_job(name), b"", timeout=2)).data == b"accepted"
        assert await heard(
            gateway, provider, f"tok.{bus.gateways[0]}.>",
            subjects.tokens(bus.gateways[0], name, JOB, 1),
        )  # fmt: skip
    assert gateway.stats["reconnects"] == 0


def test_a_seed_file_that_others_may_read_is_refused(tmp_path) -> None:
    path = tmp_path / "user.seed"
    keys.write_seed_file(path, keys.new_seed(bytes(32)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.raw_seed(keys.read_seed_file(path)) == bytes(32)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        keys.read_seed_file(path)
    path.chmod(0o600)
    path.write_text("SUAAA")
    with pytest.raises(ConfigurationError, match="nkey seed"):
        keys.raw_seed(keys.read_seed_file(path))
