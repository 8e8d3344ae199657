"""Attestation end to end over real NATS and Postgres, on DEV ONLY hardware."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.commands import decode_command
from cocoon.contracts.messages import BanRequest, DirectoryRequest, EnrolRequest
from cocoon.devnet.authority import OUT_OF_DATE, CollateralKnobs, DevAuthority
from cocoon.devnet.dev_platform import Knobs
from cocoon.domain import decide as domain
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.read import read_batch, read_commands
from cocoon.evidence.policy import policy_hash
from cocoon.evidence.provider import ProviderEvidence
from cocoon.kernel.errors import (
    CocoonError,
    ConfigurationError,
    Forbidden,
    NotFound,
    RateLimited,
    Unavailable,
)
from tests.support.attestation_world import (
    MODEL_ID,
    OTHER_MODEL_ID,
    Network,
    Provider,
    now_ms,
    offered,
)
from tests.support.servers import Bus, Database


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    return Network(bus, database, tmp_path)


async def directory(network: Network, model: str | None = "skills-1") -> dict[str, Any]:
    return await network.platform_ask("directory", DirectoryRequest(model=model))


async def until(check: Callable[[], Any], what: str) -> Any:
    for _ in range(200):
        if found := await check():
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came: {what}")


async def test_an_admitted_provider_is_in_the_log_and_in_the_directory(network: Network) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        found = await until(lambda: directory_entries(network), "the directory's entry")
        whole = await directory(network)
        everything = await directory(network, None)
    assert await network.types() == [
        "PolicyPublished", "ProviderEnrolled", "ProviderAttested", "OfferPublished",
        "KeyBundlePublished",
    ]  # fmt: skip
    (entry,) = found
    assert entry["provider_id"] == provider.provider_id
    assert entry["tier"] == "simulated"
    assert ProviderEvidence(**entry["evidence"]) == provider.evidence
    assert len(entry["bundles"]) == 1
    assert entry["offer"]["name"] == "skills-1"
    assert entry["offer"]["fee_bps"] == 500
    assert entry["load"] == {"running": 1, "concurrency": 4}
    assert whole["log"]["shard0_position"] == 5
    assert whole["policy"]["policy"]["network_id"] == "cocoon-test"
    assert [e["provider_id"] for e in everything["providers"]] == [provider.provider_id]


async def directory_entries(network: Network) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = (await directory(network))["providers"]
    return entries


def stale_collateral(provider: Provider) -> dict[str, Any]:
    return {"collateral": provider.network.authority.collateral(now_ms() - 90 * 86_400_000)}


def foreign_platform(provider: Provider) -> dict[str, Any]:
    authority = DevAuthority.create(now_ms())
    provider.platform = authority.platform(now_ms())
    return {"collateral": authority.collateral(now_ms() - 60_000)}


def out_of_date_platform(provider: Provider) -> dict[str, Any]:
    provider.platform = provider.network.authority.platform(now_ms(), OUT_OF_DATE)
    return {}


def other_keys(provider: Provider) -> dict[str, Any]:
    return {"quote": provider.platform.quote(bytes(64))}


def debuggable(provider: Provider) -> dict[str, Any]:
    knobs = Knobs(td_attributes=bytes.fromhex("0100001000000000"))
    return {"quote": provider.platform.quote(bytes(64), knobs=knobs)}


# code and status -> what is wrong with the evidence
REFUSALS: dict[tuple[str, int], Callable[[Provider], dict[str, Any]]] = {
    ("report_data_mismatch", 502): other_keys,
    ("debug", 502): debuggable,
    ("nonce", 502): lambda _: {"claims": {"challenge": bytes(32)}},
    ("claims_window", 502): lambda _: {
        "claims": {"not_before_ms": now_ms() - 7_200_000, "not_after_ms": now_ms() - 1}
    },
    ("too_old", 502): lambda _: {"claims": {"not_before_ms": now_ms() - 7_300_000}},
    ("models_mismatch", 502): lambda _: {"claims": {"models_root": bytes(32)}},
    ("model_denied", 502): lambda _: {"models": (OTHER_MODEL_ID,)},
    ("tcb_status", 502): out_of_date_platform,
    ("unknown_root", 502): foreign_platform,
    ("collateral_expired", 502): stale_collateral,
    ("collateral_missing", 503): lambda _: {"collateral": None},
    ("unsupported", 503): lambda _: {"tee": "snp"},
    ("malformed", 502): lambda _: {"quote": b"not a quote"},
    ("evidence_too_large", 413): lambda p: {"models": tuple(
        hashlib.sha256(bytes([n])).hexdigest() for n in range(256)), "bundles": (bytes(4096),) * 8,
        "gpu_reports": (bytes(64 * 1024),) * 3},
}  # fmt: skip


async def test_every_refusal_reaches_the_provider_with_its_code_and_none_is_in_the_log(
    network: Network,
) -> None:
    network.write_policy(models=(MODEL_ID,))
    async with network.running():
        for index, ((code, status), wrong) in enumerate(REFUSALS.items()):
            provider = await Provider.connect(network)
            await provider.enrol()
            changes = wrong(provider)
            evidence = provider.make_evidence(await provider.challenge(), **changes)
            if "collateral" in changes:
                evidence = evidence.model_copy(update={"collateral": changes["collateral"]})
            with pytest.raises(CocoonError) as refused:
                await provider.ask("submit_evidence", evidence)
            assert (refused.value.code, refused.value.http_status) == (code, status), index
            assert " " in refused.value.message
            assert status == 413 or (refused.value.retry_after_s or 0) > 0
    assert await network.types() == ["PolicyPublished", "ProviderEnrolled"]


async def test_a_challenge_is_good_once_and_for_five_minutes_of_its_provider(
    network: Network,
) -> None:
    async with network.running(challenge_ttl_s=10):
        provider = await Provider.connect(network)
        await provider.enrol()
        challenge = await provider.challenge()
        evidence = provider.make_evidence(challenge)
        await provider.ask("submit_evidence", evidence)
        with pytest.raises(CocoonError) as again:
            await provider.ask("submit_evidence", evidence)
        await provider.challenge()  # voids nothing but the one before it
        with pytest.raises(CocoonError) as mixed:
            await provider.ask("submit_evidence", provider.make_evidence(challenge))
    assert again.value.code == mixed.value.code == "nonce"
    assert (await network.types()).count("ProviderAttested") == 1


async def test_a_stolen_provider_id_is_refused_at_every_door(network: Network) -> None:
    async with network.running():
        victim, thief = await Provider.connect(network, 0), await Provider.connect(network, 1)
        await victim.enrol()
        with pytest.raises(Forbidden) as enrol:
            await thief.ask("enrol", EnrolRequest(identity_key=victim.identity_key))
        await thief.enrol()
        victims = victim.make_evidence(await thief.challenge())
        with pytest.raises(Forbidden) as submit:
            await thief.ask("submit_evidence", victims)
        mine = thief.make_evidence(await victim.challenge())
        with pytest.raises(CocoonError) as crossed:
            await thief.ask("submit_evidence", mine)
        with pytest.raises(Unavailable):  # the bus lets nobody speak in another's name
            await ask(
                thief.client, subjects.attestation(victim.provider_id, "challenge"), timeout_s=0.3
            )
    assert enrol.value.code == submit.value.code == "identity_mismatch"
    assert crossed.value.code == "nonce"
    assert "ProviderAttested" not in await network.types()


async def test_who_has_not_enrolled_gets_nothing(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        for verb in ("challenge", "publish_offer", "publish_profile", "publish_bundle"):
            with pytest.raises(CocoonError) as refused:
                await provider.ask(verb, EnrolRequest(identity_key="00" * 32))
            assert refused.value.code in ("not_enrolled", "bad_request")
        with pytest.raises(NotFound):
            await provider.challenge()


async def test_bundles_of_other_evidence_other_keys_or_no_attestation_are_refused(
    network: Network,
) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        await provider.attest()
        good = provider.make_bundle()
        await provider.publish_bundle(good)
        await provider.publish_bundle(good)  # a repeat changes nothing
        codes = []
        for bundle in (
            provider.make_bundle(evidence=bytes(32)),
            provider.make_bundle(signing=SigningKey.generate()),
            good[:-2],
        ):
            with pytest.raises(Forbidden) as refused:
                await provider.publish_bundle(bundle)
            codes.append(refused.value.code)
        await provider.attest()
        with pytest.raises(Forbidden) as stale:  # the evidence has changed since
            await provider.publish_bundle(good)
    assert codes == ["bad_key", "receipt_sig", "truncated"]
    assert stale.value.code == "bad_key"
    assert (await network.types()).count("KeyBundlePublished") == 1


async def test_a_key_is_listed_while_evidence_is_renewed_and_over_a_restart(
    network: Network,
) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        (before,) = await until(lambda: directory_entries(network), "the directory's entry")
        await provider.attest()
    async with network.running():
        await provider.beat()
        (still,) = await until(lambda: directory_entries(network), "the entry after a restart")
        assert (still["evidence"], still["bundles"]) == (before["evidence"], before["bundles"])
        await provider.publish_bundle()
        (entry,) = await directory_entries(network)
        assert ProviderEvidence(**entry["evidence"]) == provider.evidence


async def test_offers_hold_only_models_that_the_evidence_covers(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        await provider.attest()
        with pytest.raises(Forbidden) as other:
            await provider.publish_offer(offered(OTHER_MODEL_ID, "other"))
        with pytest.raises(CocoonError) as twice:
            await provider.publish_offer(offered(), offered())
        await provider.publish_offer()
        await provider.publish_offer()
    assert other.value.code == "models_mismatch"
    assert twice.value.code == "repeated_model"
    assert (await network.types()).count("OfferPublished") == 1


async def test_a_ban_revokes_at_once_and_holds_over_a_restart_and_other_names(
    network: Network,
) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id))
        assert await directory_entries(network) == []
        with pytest.raises(CocoonError) as itself:
            await provider.challenge()
    async with network.running():
        with pytest.raises(CocoonError) as restarted:
            await provider.challenge()
        other = await Provider.connect(network, 1, provider.platform)  # the same machine
        await other.enrol()
        with pytest.raises(CocoonError) as renamed:
            await other.attest()
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id, lift=True))
        await provider.attest()
    assert {e.value.code for e in (itself, restarted, renamed)} == {"banned"}
    events = await network.events()
    assert [d.reason for kind, d in events if kind == "AttestationRevoked"] == ["banned"]
    assert (await network.types())[-1] == "ProviderAttested"


async def test_an_attestation_ends_when_its_time_is_up(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        await provider.attest(claims={"not_after_ms": now_ms() + 400})

        async def revoked() -> bool:
            return "AttestationRevoked" in await network.types()

        await until(revoked, "the revocation")
    events = await network.events()
    assert [d.reason for kind, d in events if kind == "AttestationRevoked"] == ["expired"]


async def test_a_restart_rebuilds_providers_evidence_and_policy(network: Network) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
    before = await network.types()
    async with network.running():
        await provider.beat()
        (entry,) = await until(lambda: directory_entries(network), "the directory's entry")
        await provider.publish_bundle()
    assert ProviderEvidence(**entry["evidence"]) == provider.evidence
    assert await network.types() == [*before, "KeyBundlePublished"]


async def test_who_is_silent_or_drains_is_not_listed(network: Network) -> None:
    async with network.running(heartbeat_fresh_s=0.3):
        provider = await (await Provider.connect(network)).admitted()
        await until(lambda: directory_entries(network), "the directory's entry")

        async def gone() -> bool:
            return not await directory_entries(network)

        await until(gone, "its absence after silence")
        await provider.beat(draining=True)
        await asyncio.sleep(0.05)
        assert await directory_entries(network) == []


async def test_a_heartbeat_in_anothers_name_is_ignored(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        await provider.attest()
        await provider.publish_offer()
        await provider.publish_bundle()
        other = await Provider.connect(network, 1)
        await other.beat(provider_id=provider.provider_id)
        await asyncio.sleep(0.1)
        assert await directory_entries(network) == []


async def test_a_new_policy_is_published_once_and_judges_standing_evidence(
    network: Network,
) -> None:
    first = network.write_policy()
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
    network.write_policy(
        version=2, previous_hash=policy_hash(first).hex(), models=(OTHER_MODEL_ID,)
    )
    async with network.running():
        await provider.beat()
        assert await directory_entries(network) == []
    async with network.running():
        pass
    events = await network.events()
    assert [d.version for kind, d in events if kind == "PolicyPublished"] == [1, 2]
    assert [d.reason for kind, d in events if kind == "AttestationRevoked"] == ["model_denied"]


async def test_a_policy_that_still_takes_the_evidence_attests_it_again(network: Network) -> None:
    first = network.write_policy()
    async with network.running():
        await (await Provider.connect(network)).admitted()
    second = network.write_policy(version=2, previous_hash=policy_hash(first).hex(), suites=(1, 2))
    async with network.running():
        pass
    attested = [d for kind, d in await network.events() if kind == "ProviderAttested"]
    assert [d.policy_hash for d in attested] == [
        policy_hash(first).hex(), policy_hash(second).hex(),
    ]  # fmt: skip


async def test_newer_collateral_raises_the_floor_for_everyone_for_ever(network: Network) -> None:
    newer = CollateralKnobs(evaluation_number=101)
    async with network.running():
        first = await (await Provider.connect(network, 0)).admitted()
        second = await Provider.connect(network, 1)
        await second.enrol()
        text = network.authority.collateral(now_ms() - 60_000, knobs=newer)
        await second.attest(collateral=text)

        async def revoked() -> bool:
            return "AttestationRevoked" in await network.types()

        await until(revoked, "the first provider's revocation")
    async with network.running():  # the floor is kept
        with pytest.raises(CocoonError) as refused:
            await first.attest()
    assert refused.value.code == "tcb_eval_number"
    events = await network.events()
    assert [(d.provider_id, d.reason) for kind, d in events if kind == "AttestationRevoked"] == [
        (first.provider_id, "tcb_eval_number")
    ]


async def test_a_provider_cannot_grow_the_log_without_end(network: Network) -> None:
    async with network.running(writes_per_provider=4):
        provider = await Provider.connect(network)
        await provider.enrol()
        prices = [offered().model_copy(update={"output_nanoton_per_mtok": n}) for n in range(4)]
        for model in prices[:3]:
            await provider.publish_offer(model)
        with pytest.raises(RateLimited) as refused:
            await provider.publish_offer(prices[3])
    assert refused.value.retry_after_s is not None
    assert len(await network.types()) == 5


async def test_an_older_or_unrelated_policy_does_not_start(network: Network) -> None:
    first = network.write_policy(version=3)
    async with network.running():
        pass
    for changes in (
        {"version": 2},
        {"version": 3, "suites": (1, 2)},
        {"version": 4, "previous_hash": "00" * 32},
        {"version": 4},
    ):
        network.write_policy(**changes)
        with pytest.raises(ConfigurationError):
            async with network.running():
                pass
    network.write_policy(version=4, previous_hash=policy_hash(first).hex())
    async with network.running():
        pass


async def test_a_newer_writer_fences_the_older_one(network: Network) -> None:
    async with network.running() as stop:
        provider = await Provider.connect(network)
        usurper = LogAppender(network.database.dsn("cocoon_attestation"), 0, "attestation")
        await usurper.acquire_term()
        with pytest.raises(Unavailable):
            await provider.enrol()
        await usurper.close()
        assert stop.error is not None
        assert stop.error.code == "stale_term"


async def test_garbage_gets_a_plain_refusal(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        for verb in (
            "enrol", "submit_evidence", "publish_offer", "publish_profile", "publish_bundle",
        ):  # fmt: skip
            raw = await provider.client.request(
                subjects.attestation(provider.provider_id, verb), b"\xff\x00{", timeout=5
            )
            reply = json.loads(raw.data)
            assert reply["ok"] is False
            assert reply["error"]["status"] in (400, 502)


async def test_a_production_environment_refuses_a_dev_network(network: Network) -> None:
    with pytest.raises(ConfigurationError, match="production environment"):
        async with network.running(environment="prod"):
            pass
    assert await network.types() == []


async def test_one_trace_runs_from_the_provider_to_the_log(network: Network) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    async with network.running():
        provider = await Provider.connect(network)
        body = EnrolRequest(identity_key=provider.identity_key).to_canonical()
        subject = subjects.attestation(provider.provider_id, "enrol")
        await provider.client.request(subject, body, headers={"traceparent": parent}, timeout=5)
    conn = await connect_log(network.database.admin_dsn, "test")
    traces = [e.traceparent for e in await read_batch(conn, 0, 1, 10)]
    await conn.close()
    assert traces == ["", parent]


async def test_every_decision_can_be_made_again_from_its_stored_command(network: Network) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id))
    conn = await connect_log(network.database.admin_dsn, "test")
    events = await read_batch(conn, 0, 1, 100)
    commands = {c.command_id: c for c in await read_commands(conn, 0, 1, 100)}
    await conn.close()
    states: dict[str, Any] = {}
    for event in events:
        command = decode_command(commands[event.causation_id].data)
        state = states.setdefault(event.stream, domain.initial(event.stream))
        assert domain.decide(state, command) == (event.decode(),)
        states[event.stream] = domain.evolve(state, event.decode(), event.stream)
    assert len(events) == 6
