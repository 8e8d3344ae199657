"""The pure parts of attestation: rules at start, challenges, pages of the directory, answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts import events as e
from cocoon.contracts.envelope import GENESIS_HASH, NewEvent, StoredEvent
from cocoon.contracts.messages import Heartbeat
from cocoon.evidence.policy import SignedPolicy, sign
from cocoon.evidence.trust import TrustAnchors, intel_anchor
from cocoon.kernel import canonical
from cocoon.kernel.errors import ConfigurationError, EvidenceRejected, Fatal, LogCorrupt
from services.attestation import decide
from services.attestation.challenges import Challenges
from services.attestation.memory import MAX_PAGE_BYTES, Memory
from services.attestation.rpc import answer
from tests.support import evidence_world as world

HEAD = bytes(range(32))


def prod_trust(**changes: Any) -> TrustAnchors:
    trust = replace(world.trust(), network_class="prod", anchors=(intel_anchor(),))
    return replace(trust, **changes)


def prod_policy(**changes: Any) -> SignedPolicy:
    fields = {"network_class": "prod", "anchors": (intel_anchor().fingerprint,)}
    return sign(world.policy(**{**fields, **changes}), [world.SIGNER])


def dev_policy(**changes: Any) -> SignedPolicy:
    return sign(world.policy(**changes), [world.SIGNER])


def test_matching_rules_start() -> None:
    decide.check_environment("prod", prod_trust(), prod_policy())
    decide.check_environment("dev", world.trust(), dev_policy())


@pytest.mark.parametrize(
    ("environment", "trust", "signed", "words"),
    [
        ("prod", world.trust(), dev_policy(), "production environment, but the trust file"),
        ("prod", prod_trust(anchors=world.trust().anchors), prod_policy(), "DEV ONLY root"),
        ("prod", prod_trust(), dev_policy(), "production environment, but the policy"),
        ("dev", prod_trust(), dev_policy(), "different classes"),
        ("dev", world.trust(), dev_policy(network_id="other"), "another network"),
        ("dev", world.trust(), sign(world.policy(), [bytes(32)]), "signature"),
        ("prod", prod_trust(policy_threshold=2), prod_policy(), "2 good signature"),
        ("dev", world.trust(), dev_policy(anchors=("00" * 32,)), "vendor root"),
    ],
)
def test_rules_that_do_not_belong_together_do_not_start(
    environment: str, trust: TrustAnchors, signed: SignedPolicy, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        decide.check_environment(environment, trust, signed)


# ---- challenges ----


def answering(challenges: Challenges, provider_id: str, now_ms: int) -> Any:
    issued = challenges.issue(provider_id, HEAD, bytes(32), now_ms)
    return world.Scene(
        evidence={
            "provider_id": provider_id,
            "checkpoint_root": issued.checkpoint_root,
            "challenge_random": issued.challenge_random,
        }
    ).provider_evidence()


def test_a_challenge_is_spent_once_within_its_time() -> None:
    challenges = Challenges(10, 300_000)
    evidence = answering(challenges, world.PROVIDER, 0)
    challenges.spend(evidence, 299_999)
    with pytest.raises(EvidenceRejected) as again:
        challenges.spend(evidence, 299_999)
    late = answering(challenges, world.PROVIDER, 0)
    with pytest.raises(EvidenceRejected) as refused:
        challenges.spend(late, 300_000)
    assert again.value.code == refused.value.code == "nonce"


@given(st.lists(st.integers(0, 30), max_size=60))
def test_challenges_are_bounded_and_one_a_provider(asked: list[int]) -> None:
    challenges = Challenges(8, 1000)
    for number in asked:
        challenges.issue(f"prov_{number:032x}", HEAD, bytes(32), 0)
    assert len(challenges) == min(8, len(set(asked)))


# ---- the directory ----


def stored(position: int, stream: str, version: int, data: e.EventData) -> StoredEvent:
    new = NewEvent(stream, data)
    return StoredEvent(
        shard=0, position=position, stream=new.stream, version=version, type=data.event_type,
        schema_version=1, event_id="e", causation_id="c", correlation_id="x", actor="attestation",
        recorded_at_us=1, data=data.to_canonical(), prev_hash=GENESIS_HASH,
        hash=position.to_bytes(32, "big"),
    )  # fmt: skip


def populated(count: int) -> Memory:
    memory = Memory(3.0, 500)
    position = 0
    for number in range(count):
        provider_id = f"prov_{number:032x}"
        stream, evidence_id = f"provider/{provider_id}", f"{number:064x}"
        model = e.OfferedModel(
            model_id=world.MODEL, name="skills-1", context_tokens=1, input_nanoton_per_mtok=1,
            cached_input_nanoton_per_mtok=1, output_nanoton_per_mtok=1,
        )  # fmt: skip
        history: list[e.EventData] = [
            e.ProviderEnrolled(provider_id=provider_id, identity_key="00" * 32, tier="simulated"),
            e.ProviderAttested(
                provider_id=provider_id, evidence_id=evidence_id, verdict="ok:UpToDate",
                assurance="simulated", signing_key="00" * 32, models_root="00" * 32,
                valid_until_ms=2000, collateral_hash="00" * 32, policy_hash="00" * 32,
            ),
            e.OfferPublished(provider_id=provider_id, models=(model,), concurrency=1),
            e.KeyBundlePublished(
                provider_id=provider_id, key_id=f"{number:032x}", evidence_id=evidence_id,
                not_before_ms=0, not_after_ms=1500, bundle="00",
            ),
        ]  # fmt: skip
        for version, event in enumerate(history, start=1):
            position += 1
            memory.apply(stored(position, stream, version, event))
        evidence = world.Scene(evidence={"provider_id": provider_id}).provider_evidence()
        memory.remember_evidence(evidence_id, evidence, "")
        memory.heartbeat(
            Heartbeat(provider_id=provider_id, boot_id="00" * 16, sequence=1, running=(),
                      concurrency=1), 0.0,
        )  # fmt: skip
    return memory


def test_pages_join_to_the_whole_directory_and_fit_the_bus() -> None:
    memory, after, seen = populated(40), "", []
    for _ in range(10):
        entries, after = memory.directory("skills-1", after, 1000, 1.0)
        assert len(canonical.dumps(entries)) <= MAX_PAGE_BYTES + 40
        seen += [entry["provider_id"] for entry in entries]
        if not after:
            break
    assert seen == [f"prov_{number:032x}" for number in range(40)]


@pytest.mark.parametrize(
    ("model", "now_ms", "now_s", "count"),
    [
        ("skills-1", 1000, 1.0, 2),
        (world.MODEL, 1000, 1.0, 2),
        (None, 1000, 1.0, 2),
        ("other", 1000, 1.0, 0),
        ("skills-1", 1000, 3.5, 0),  # silent
        ("skills-1", 1500, 1.0, 0),  # the bundles have ended
        ("skills-1", 2000, 1.0, 0),  # the attestation has ended
    ],
)
def test_only_what_can_be_sealed_to_now_is_listed(
    model: str | None, now_ms: int, now_s: float, count: int
) -> None:
    assert len(populated(2).directory(model, "", now_ms, now_s)[0]) == count


def test_renewed_evidence_leaves_the_former_key_listed_until_its_own_key_is_out() -> None:
    memory = populated(1)
    provider_id = "prov_" + "0" * 32
    stream, fresh = f"provider/{provider_id}", "f" * 64
    (before,) = memory.directory("skills-1", "", 1000, 1.0)[0]
    state = memory.providers[provider_id]
    assert state.attested is not None
    renewed = state.attested.model_copy(update={"evidence_id": fresh, "valid_until_ms": 4000})
    memory.apply(stored(5, stream, 5, renewed))
    evidence = world.Scene(evidence={"provider_id": provider_id, "checkpoint_root": "11" * 32})
    memory.remember_evidence(fresh, evidence.provider_evidence(), "")
    assert memory.directory("skills-1", "", 1000, 1.0)[0] == [before]
    assert memory.evidence_ids() == {"0" * 64, fresh}

    key = state.bundles[0].model_copy(
        update={"key_id": "e" * 32, "evidence_id": fresh, "not_after_ms": 3000, "bundle": "01"}
    )
    memory.apply(stored(6, stream, 6, key))
    (entry,) = memory.directory("skills-1", "", 1000, 1.0)[0]
    assert entry["bundles"] == ["01"]
    assert entry["evidence"] == memory.evidence[fresh].model_dump(mode="json")
    assert entry["evidence"] != before["evidence"]

    revoked = e.AttestationRevoked(provider_id=provider_id, evidence_id=fresh, reason="banned")
    memory.apply(stored(7, stream, 7, revoked))
    assert memory.directory("skills-1", "", 1000, 1.0)[0] == []
    assert memory.evidence == {}


def test_an_event_folded_twice_equals_once() -> None:
    memory = populated(1)
    revoked = e.AttestationRevoked(
        provider_id="prov_" + "0" * 32, evidence_id="0" * 64, reason="expired"
    )
    event = stored(5, "provider/prov_" + "0" * 32, 5, revoked)
    memory.apply(event)
    once = (dict(memory.providers), memory.position, dict(memory.evidence))
    memory.apply(event)
    assert (memory.providers, memory.position, memory.evidence) == once
    assert memory.evidence == {}


# ---- the door ----


class Stopped:
    def __init__(self) -> None:
        self.errors: list[Fatal] = []

    def stop(self, error: Fatal) -> None:
        self.errors.append(error)


async def test_an_unknown_failure_is_answered_without_its_text() -> None:
    async def broken(*_: object) -> dict[str, object]:
        raise ValueError("CANARY the patient's name")

    reply = await answer(
        Stopped(), "enrol", broken, f"rpc.attestation.{world.PROVIDER}.enrol", b"{}", ""  # type: ignore[arg-type]
    )  # fmt: skip
    assert reply.error is not None
    assert reply.error.status == 500
    assert "patient" not in reply.model_dump_json()


async def test_a_broken_invariant_stops_the_service_and_tells_the_provider_to_wait() -> None:
    async def broken(*_: object) -> dict[str, object]:
        raise LogCorrupt("the chain breaks")

    stopped = Stopped()
    reply = await answer(
        stopped, "enrol", broken, f"rpc.attestation.{world.PROVIDER}.enrol", b"{}", ""  # type: ignore[arg-type]
    )  # fmt: skip
    assert reply.error is not None
    assert reply.error.status == 503
    assert [error.code for error in stopped.errors] == ["log_corrupt"]


async def test_a_subject_that_names_no_provider_is_refused() -> None:
    async def never(*_: object) -> dict[str, object]:
        raise AssertionError

    reply = await answer(Stopped(), "enrol", never, "rpc.attestation.nobody.enrol", b"{}", "")  # type: ignore[arg-type]
    assert reply.error is not None
    assert reply.error.code == "identity_mismatch"
