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
from cocoon.contracts import subjects
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


async def test_a_provider_answers_a_dispatch_on_its_own_subject_and_nowhere_else(bus: Bus) -> None:
    mine = bus.providers[0]
    provider, gateway = await bus.connect(mine), await bus.connect("gateway")
    own = subjects.tokens(bus.gateways[0], mine, JOB, 1)

    async def accept(message: Msg) -> None:
        assert not message.reply  # where a gateway wants an answer does not cross
        await provider.publish(own, b"accepted")

    await provider.subscribe(subjects.run_job(mine), cb=accept)
    await provider.flush()
    answers = await gateway.subscribe(f"tok.{bus.gateways[0]}.>")
    await gateway.flush()
    inbox = gateway.new_inbox()
    await gateway.publish(subjects.run_job(mine), b"envelope", reply="")
    assert (await answers.next_msg(timeout=2)).data == b"accepted"
    assert not await heard(gateway, provider, inbox, inbox)


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
    table["prov_x"] = permissions.provider("prov_x", "BERTH_0001")
    table["prov_y"], table["gw1"] = permissions.stranger("prov_y"), permissions.gateway("gw1")
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
    for seed_file in (stranger, None):  # nobody answers for strangers: attestation is not there
        with pytest.raises(ConfigurationError, match="does not know"):
            await connection.connect(
                bus.server.url, seed_file, "stranger", "_INBOX_stranger", timeout_s=4
            )
    bus.server.kill()
    with pytest.raises(Unavailable):
        await connection.connect(bus.server.url, stranger, "s", "_INBOX_s", timeout_s=0.3)


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
