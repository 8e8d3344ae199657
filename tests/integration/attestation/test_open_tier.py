"""The open tier over real NATS and Postgres: who enters without a TEE, and how far."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from cocoon.contracts.commands import decode_command
from cocoon.contracts.events import ProviderAttested, ProviderEnrolled
from cocoon.contracts.messages import BanRequest, DirectoryRequest, OfferRequest
from cocoon.domain import decide as domain
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.read import read_batch, read_commands
from cocoon.evidence.claims import TeeKind, evidence_id
from cocoon.evidence.policy import OpenTierRules, policy_hash
from cocoon.evidence.provider import ProviderEvidence
from cocoon.kernel.errors import BadRequest, CocoonError, EvidenceRejected, Forbidden, RateLimited
from cocoon.sealing.keys import EPOCH_MS, KeyBundle
from tests.support.attestation_world import Network, OpenProvider, Provider, now_ms, offered
from tests.support.sentences import is_sentence
from tests.support.servers import Bus, Database

ONE = OpenTierRules(
    allowed=True, max_running_jobs=2, max_job_nanoton=5_000_000, max_providers=1
)  # fmt: skip
TWO = ONE.model_copy(update={"max_providers": 2})


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    found = Network(bus, database, tmp_path)
    found.write_policy(open_tier=TWO)
    return found


async def listed(network: Network) -> list[dict[str, Any]]:
    answer = await network.platform_ask("directory", DirectoryRequest(model="skills-1"))
    entries: list[dict[str, Any]] = answer["providers"]
    return entries


async def revoked(network: Network) -> list[str]:
    return [d.reason for kind, d in await network.events() if kind == "AttestationRevoked"]


async def until_revoked(network: Network) -> str:
    for _ in range(200):
        if found := await revoked(network):
            return found[-1]
        await asyncio.sleep(0.02)
    raise AssertionError("nothing was revoked")


async def test_a_provider_without_a_tee_enters_and_is_called_open_everywhere(
    network: Network,
) -> None:
    async with network.running():
        provider = await OpenProvider.connect(network)
        assert (await provider.enrol())["tier"] == "open"
        answer = await provider.attest()
        await provider.publish_offer()
        await provider.publish_bundle()
        await provider.beat()
        (entry,) = await listed(network)
    assert provider.evidence is not None
    assert (answer["verdict"], answer["assurance"]) == ("ok:open", "open")
    assert answer["evidence_id"] == evidence_id(TeeKind.NONE, provider.evidence.quote).hex()
    assert (entry["tier"], entry["evidence"]["tee"]) == ("open", "none")
    assert ProviderEvidence(**entry["evidence"]) == provider.evidence
    events = await network.events()
    assert [kind for kind, _ in events] == [
        "OpenTierLimitsSet", "PolicyPublished", "ProviderEnrolled", "ProviderAttested",
        "OfferPublished", "KeyBundlePublished",
    ]  # fmt: skip
    limits, policy, enrolled, attested = (data for _, data in events[:4])
    assert limits.policy_hash == policy.policy_hash
    assert (limits.limits.max_running_jobs, limits.limits.max_job_nanoton) == (2, 5_000_000)
    assert isinstance(enrolled, ProviderEnrolled)
    assert isinstance(attested, ProviderAttested)
    assert (enrolled.tier, attested.assurance) == ("open", "open")
    assert attested.valid_until_ms <= 2**53


async def test_its_log_decides_the_same_again(network: Network) -> None:
    async with network.running():
        await (await OpenProvider.connect(network)).admitted()
    conn = await connect_log(network.database.admin_dsn, "test")
    try:
        events = await read_batch(conn, 0, 1, 100)
        commands = await read_commands(conn, 0, 1, len(events))
    finally:
        await conn.close()
    states: dict[str, domain.State] = {}
    made = []
    for stored in commands:
        command = decode_command(stored.data)
        stream = domain.stream_of(command)
        state = states.get(stream, domain.initial(stream))
        for event in domain.decide(state, command):
            state = domain.evolve(state, event, stream)
            made.append(event)
        states[stream] = state
    assert made == [event.decode() for event in events]


@pytest.mark.parametrize("rules", [None, TWO.model_copy(update={"allowed": False})])
async def test_a_policy_without_an_open_tier_refuses_with_a_sentence(
    network: Network, rules: OpenTierRules | None
) -> None:
    network.write_policy(open_tier=rules)
    async with network.running():
        provider = await OpenProvider.connect(network)
        with pytest.raises(Forbidden) as enrol:
            await provider.enrol()
        await provider.enrol(tier=None)
        with pytest.raises(Forbidden) as attest:
            await provider.attest()
    assert enrol.value.code == "open_tier"
    assert "takes no provider without a TEE" in enrol.value.message
    assert is_sentence(enrol.value.message)
    assert attest.value.code == "tier_mismatch"
    assert await network.types() == ["PolicyPublished", "ProviderEnrolled"]


async def test_the_kind_of_evidence_is_the_one_that_was_enrolled_for(network: Network) -> None:
    async with network.running():
        provider = await OpenProvider.connect(network)
        await provider.enrol()
        quoted = Provider.make_evidence(provider, await provider.challenge())
        with pytest.raises(Forbidden) as with_quote:
            await provider.ask("submit_evidence", quoted)
        lifted = provider.make_evidence(await provider.challenge(), tee="tdx")
        with pytest.raises(Forbidden) as called_tdx:
            await provider.ask("submit_evidence", lifted)
        await provider.enrol(tier=None)
        lifted = provider.make_evidence(await provider.challenge(), tee="tdx")
        with pytest.raises(CocoonError) as enrolled_tdx:
            await provider.ask("submit_evidence", lifted)
    assert with_quote.value.code == called_tdx.value.code == "tier_mismatch"
    assert enrolled_tdx.value.code == "malformed"
    assert "ProviderAttested" not in await network.types()


async def test_a_stranger_s_signature_and_a_used_challenge_are_refused(network: Network) -> None:
    async with network.running():
        provider = await OpenProvider.connect(network)
        other = await OpenProvider.connect(network, 1)
        await provider.enrol()
        theirs = other.make_evidence(await provider.challenge(), provider_id=provider.provider_id)
        with pytest.raises(EvidenceRejected) as refused:
            await provider.ask("submit_evidence", theirs)
        await provider.attest()
        with pytest.raises(EvidenceRejected) as again:
            await provider.ask("submit_evidence", provider.evidence)
    assert (refused.value.code, again.value.code) == ("identity", "nonce")


async def test_the_tier_has_as_many_places_as_the_policy_says_and_they_come_free(
    network: Network,
) -> None:
    network.write_policy(open_tier=ONE)
    async with network.running():
        first, second = [await OpenProvider.connect(network, n) for n in (0, 1)]
        await first.enrol()
        await second.enrol()  # a place is taken by evidence, not by a name
        await first.attest()
        with pytest.raises(RateLimited) as full:
            await second.attest()
        with pytest.raises(RateLimited) as enrol:
            await second.enrol()
        await first.attest()  # its own place is no obstacle
        protected = await Provider.connect(network, 1)
        await protected.enrol()
        await protected.attest()  # nor has the tier to do with others
        await network.platform_ask("ban", BanRequest(provider_id=first.provider_id))
        await second.enrol()
        await second.attest()
    assert full.value.code == enrol.value.code == "open_tier_full"
    assert full.value.retry_after_s == 300
    assert is_sentence(full.value.message)


async def test_two_do_not_take_the_last_place_at_once(network: Network) -> None:
    network.write_policy(open_tier=ONE)
    async with network.running():
        both = [await OpenProvider.connect(network, n) for n in (0, 1)]
        for provider in both:
            await provider.enrol()
        made = [provider.make_evidence(await provider.challenge()) for provider in both]
        found = await asyncio.gather(
            *(p.ask("submit_evidence", one) for p, one in zip(both, made, strict=True)),
            return_exceptions=True,
        )
    assert sorted(isinstance(one, RateLimited) for one in found) == [False, True]
    assert (await network.types()).count("ProviderAttested") == 1


async def test_a_policy_that_closes_the_tier_ends_who_stands_in_it(network: Network) -> None:
    first = network.write_policy(open_tier=TWO)
    async with network.running():
        await (await OpenProvider.connect(network)).admitted()
        await (await Provider.connect(network, 1)).admitted()
    network.write_policy(version=2, previous_hash=policy_hash(first).hex())
    async with network.running():
        pass
    assert await revoked(network) == ["open_tier"]


async def test_a_narrower_policy_ends_those_beyond_its_places(network: Network) -> None:
    first = network.write_policy(open_tier=TWO)
    async with network.running():
        for index in (0, 1):
            await (await OpenProvider.connect(network, index)).admitted()
    network.write_policy(version=2, previous_hash=policy_hash(first).hex(), open_tier=ONE)
    async with network.running():
        pass
    assert await revoked(network) == ["open_tier_full"]


async def test_who_changes_the_tier_stands_on_nothing_until_it_attests_as_such(
    network: Network,
) -> None:
    async with network.running():
        protected = await (await Provider.connect(network)).admitted()
        assert [entry["tier"] for entry in await listed(network)] == ["simulated"]
        provider = await OpenProvider.connect(network)
        provider.signing = protected.signing  # even under the same signing key
        await provider.enrol()
        assert await listed(network) == []
        await provider.attest()
        assert await listed(network) == []  # the key of before is gone
        await provider.publish_bundle()
        await provider.beat()
        assert [entry["tier"] for entry in await listed(network)] == ["open"]
    assert await revoked(network) == ["tier_changed"]


async def test_its_word_runs_out_and_it_is_revoked(network: Network) -> None:
    async with network.running():
        provider = await OpenProvider.connect(network)
        await provider.enrol()
        await provider.attest(claims={"not_after_ms": now_ms() + 1500})
        assert await until_revoked(network) == "expired"


async def test_nobody_announces_the_key_of_another(network: Network) -> None:
    """A public key is public: whoever announced a copy of it would get the jobs sealed to it."""
    async with network.running():
        owner = await (await Provider.connect(network)).admitted()
        thief = await OpenProvider.connect(network, 1)
        await thief.enrol()
        await thief.attest()
        owned = bytes.fromhex((await listed(network))[0]["bundles"][0])
        key, now = owned[5:37], now_ms()
        evidence = evidence_id(TeeKind.NONE, thief.evidence.quote)  # type: ignore[union-attr]
        copied = KeyBundle(key, 1, now, now + EPOCH_MS, evidence).sign(thief.signing).hex()
        with pytest.raises(Forbidden, match="a key of your own") as refused:
            await thief.publish_bundle(copied)
        await owner.publish_bundle(owned.hex())  # the owner's repeat changes nothing
    assert refused.value.code == "key_taken"
    assert (await network.types()).count("KeyBundlePublished") == 1


async def kept_evidence(network: Network) -> int:
    conn = await connect_log(network.database.admin_dsn, "test")
    try:
        found: int = await conn.fetchval("SELECT count(*) FROM attestation.evidence")
        return found
    finally:
        await conn.close()


async def test_evidence_that_may_not_count_is_not_kept(network: Network) -> None:
    """Whoever signs his own evidence makes as much of it as he likes."""
    network.write_policy(open_tier=ONE)
    async with network.running(writes_per_provider=3):
        first, second = [await OpenProvider.connect(network, n) for n in range(2)]
        for provider in (first, second):
            await provider.enrol()
        for _ in range(2):
            await first.attest()
        with pytest.raises(RateLimited, match="written too much"):
            await first.attest()
        with pytest.raises(RateLimited, match="open tier has all"):
            await second.attest()
    assert await kept_evidence(network) == 2


async def test_an_offer_names_no_more_models_than_evidence_can_prove(network: Network) -> None:
    """Whoever enrols may write offers into the log, and everybody holds them in memory."""
    network.write_policy(open_tier=ONE, models=None)
    many = [
        offered(hashlib.sha256(bytes((n & 255, n >> 8))).hexdigest(), f"m{n}") for n in range(257)
    ]
    async with network.running():
        provider = await OpenProvider.connect(network)
        await provider.enrol()
        await provider.publish_offer(*many[:256])
        with pytest.raises(BadRequest):
            await provider.ask(
                "publish_offer", OfferRequest.model_construct(models=tuple(many), concurrency=4)
            )
