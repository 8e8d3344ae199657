"""Providers in shard 0: enrolled once, attested only with an ok verdict, keys under evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocoon.contracts.commands import (
    AttestProvider,
    EnrolProvider,
    PublishKeyBundle,
    PublishOffer,
    PublishProfile,
    RevokeAttestation,
)  # fmt: skip
from cocoon.contracts.events import (
    AccountOpened,
    AttestationRevoked,
    EventData,
    KeyBundlePublished,
    ProfiledModel,
    ProviderAttested,
)
from cocoon.domain.provider import (
    MAX_BUNDLES,
    ProviderState,
    decide_attest_provider,
    decide_enrol_provider,
    decide_publish_bundle,
    decide_publish_offer,
    decide_publish_profile,
    decide_revoke_attestation,
    evolve,
)  # fmt: skip
from cocoon.kernel.errors import BadRequest, Conflict, Forbidden, NotFound
from tests.support.job_world import ALICE, BOB, MODEL, OFFERED, hex16, hex32
from tests.support.sentences import says_why

ENROLLED, OFFER, ATTESTED, BUNDLE = ALICE.network_events()
ENROL = EnrolProvider.model_validate(ENROLLED.model_dump())
PUBLISH = PublishOffer.model_validate(OFFER.model_dump())
ATTEST = AttestProvider.model_validate(ATTESTED.model_dump())
PUBLISH_KEY = PublishKeyBundle.model_validate(BUNDLE.model_dump())
REVOKE_FRESH = AttestationRevoked(provider_id=ALICE.id, evidence_id=hex32("fresh"), reason="banned")
REVOKE = RevokeAttestation(provider_id=ALICE.id, evidence_id=ALICE.evidence_id, reason="ban")


def after(*events: EventData) -> ProviderState:
    state = ProviderState()
    for event in events:
        state = evolve(state, event)
    return state


READY = after(ENROLLED, OFFER, ATTESTED, BUNDLE)


def test_the_events_tell_the_provider() -> None:
    ready = ProviderState(ENROLLED, OFFER, ATTESTED, (BUNDLE,), version=4)  # type: ignore[arg-type]
    assert ready == READY
    dearer = OFFER.model_copy(update={"concurrency": 9})
    assert evolve(READY, dearer) == replace(READY, offer=dearer, version=5)
    stranger = AccountOpened(account_id="acct_1")
    assert evolve(READY, stranger) == replace(READY, version=5)


def test_enrolment_is_written_once_and_again_for_another_tier() -> None:
    assert decide_enrol_provider(ProviderState(), ENROL) == (ENROLLED,)
    assert decide_enrol_provider(READY, ENROL) == ()
    raised = ENROL.model_copy(update={"tier": "facility"})
    (event,) = decide_enrol_provider(READY, raised)
    assert event.tier == "facility"  # type: ignore[attr-defined]


@pytest.mark.parametrize("tier", ["simulated", "facility"])
def test_a_provider_id_never_changes_its_identity_key(tier: str) -> None:
    stolen = ENROL.model_copy(
        update={"identity_key": bytes(BOB.identity.verify_key).hex(), "tier": tier}
    )
    with pytest.raises(Conflict, check=says_why) as refused:
        decide_enrol_provider(READY, stolen)
    assert refused.value.code == "identity_taken"


def test_an_unchanged_offer_writes_nothing() -> None:
    assert decide_publish_offer(after(ENROLLED), PUBLISH) == (OFFER,)
    assert decide_publish_offer(READY, PUBLISH) == ()
    dearer = OFFERED.model_copy(update={"output_nanoton_per_mtok": 5_000_000})
    changed = PUBLISH.model_copy(update={"models": (dearer,)})
    assert len(decide_publish_offer(READY, changed)) == 1


PROFILE = PublishProfile(
    provider_id=ALICE.id, region="eu-west",
    models=(ProfiledModel(model_id=MODEL, quantisation="int8"),),
)  # fmt: skip


def test_a_profile_is_written_once_and_again_when_it_changes() -> None:
    (event,) = decide_publish_profile(READY, PROFILE)
    state = evolve(READY, event)
    assert (state.region, state.quantisation(MODEL)) == ("eu-west", "int8")
    assert state.quantisation(hex32("another")) is None
    assert decide_publish_profile(state, PROFILE) == ()
    (moved,) = decide_publish_profile(state, PROFILE.model_copy(update={"region": ""}))
    assert evolve(state, moved).region is None


def test_who_has_told_no_profile_tells_no_region_and_no_quantisation() -> None:
    assert (READY.region, READY.quantisation(MODEL)) == (None, None)


def test_a_profile_that_names_a_model_twice_is_refused() -> None:
    twice = PROFILE.model_copy(update={"models": PROFILE.models * 2})
    with pytest.raises(BadRequest, match="once", check=says_why):
        decide_publish_profile(READY, twice)


def test_a_profile_outlives_new_evidence_and_a_revocation() -> None:
    (event,) = decide_publish_profile(READY, PROFILE)
    (revoked,) = decide_revoke_attestation(READY, REVOKE)
    state = evolve(evolve(evolve(READY, event), revoked), ATTESTED)
    assert state.region == "eu-west"


@pytest.mark.parametrize("decide", [
    lambda state: decide_publish_profile(state, PROFILE),
    lambda state: decide_publish_offer(state, PUBLISH),
    lambda state: decide_attest_provider(state, ATTEST),
])  # fmt: skip
def test_a_stranger_must_enrol_first(decide) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotFound, match="enrol", check=says_why):
        decide(ProviderState())


@pytest.mark.parametrize("verdict", ["ok", "ok:warnings"])
def test_an_ok_verdict_is_recorded_once(verdict: str) -> None:
    command = ATTEST.model_copy(update={"verdict": verdict})
    (event,) = decide_attest_provider(after(ENROLLED), command)
    assert decide_attest_provider(after(ENROLLED, event), command) == ()


@pytest.mark.parametrize("verdict", ["okay", "not_ok", "OK", "failed", "ok_", "tcb_out_of_date"])
def test_any_other_verdict_fails_closed(verdict: str) -> None:
    with pytest.raises(Forbidden, match=verdict, check=says_why) as refused:
        decide_attest_provider(after(ENROLLED), ATTEST.model_copy(update={"verdict": verdict}))
    assert refused.value.code == "evidence_rejected"


def test_a_revocation_names_the_current_evidence_and_takes_the_keys_with_it() -> None:
    (event,) = decide_revoke_attestation(READY, REVOKE)
    state = evolve(READY, event)
    assert (state.attested, state.bundles) == (None, ())
    assert decide_revoke_attestation(state, REVOKE) == ()
    other = REVOKE.model_copy(update={"evidence_id": hex32("older")})
    assert decide_revoke_attestation(READY, other) == ()


def test_a_key_is_published_once_and_only_under_the_current_evidence() -> None:
    state = after(ENROLLED, OFFER, ATTESTED)
    assert decide_publish_bundle(state, PUBLISH_KEY) == (BUNDLE,)
    assert decide_publish_bundle(READY, PUBLISH_KEY) == ()
    stale = PUBLISH_KEY.model_copy(update={"evidence_id": hex32("older")})
    for where in (state, after(ENROLLED)):
        with pytest.raises(Forbidden, check=says_why) as refused:
            decide_publish_bundle(where, stale)
        assert refused.value.code == "stale_evidence"


def test_renewed_evidence_keeps_the_keys_of_the_same_boot_until_they_end() -> None:
    again = ATTESTED.model_copy(update={"valid_until_ms": 10**13})
    fresh = again.model_copy(update={"evidence_id": hex32("fresh")})
    for event in (again, fresh):
        assert evolve(READY, event).bundles == (BUNDLE,)
    both = after(ENROLLED, ATTESTED, BUNDLE, fresh, _under(fresh))
    assert both.bundles == (BUNDLE, _under(fresh))
    assert evolve(both, REVOKE_FRESH).bundles == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"signing_key": hex32("after a restart")},
        {"policy_hash": hex32("the next policy")},
    ],
)
def test_another_boot_or_policy_ends_the_keys_of_former_evidence(changes: dict[str, str]) -> None:
    fresh = ATTESTED.model_copy(update={"evidence_id": hex32("fresh"), **changes})
    assert evolve(READY, fresh).bundles == ()
    again = ATTESTED.model_copy(update=changes)  # the same evidence, judged again
    assert evolve(READY, again).bundles == (BUNDLE,)


def test_a_key_outlives_its_evidence_under_no_other() -> None:
    short = ATTESTED.model_copy(update={"valid_until_ms": BUNDLE.not_after_ms - 1})
    fresh = ATTESTED.model_copy(update={"evidence_id": hex32("fresh")})
    assert after(ENROLLED, short, BUNDLE, fresh).bundles == ()


def _under(attested: ProviderAttested) -> KeyBundlePublished:
    return BUNDLE.model_copy(
        update={"evidence_id": attested.evidence_id, "key_id": hex16("the next key")}
    )


def test_the_number_of_keys_is_bounded_and_the_newest_stay() -> None:
    state = READY
    for index in range(MAX_BUNDLES + 2):
        state = evolve(state, BUNDLE.model_copy(update={"key_id": hex16(f"epoch {index}")}))
    assert [b.key_id for b in state.bundles] == [hex16(f"epoch {i}") for i in range(2, 6)]


# ---- the open tier ----

OPEN_ENROLLED = ENROLLED.model_copy(update={"tier": "open"})
OPEN_ATTESTED = ATTESTED.model_copy(update={"assurance": "open", "verdict": "ok:open"})
OPEN_ENROL = ENROL.model_copy(update={"tier": "open"})


@pytest.mark.parametrize("assurance", ["simulated", "attested", "facility"])
def test_who_enrolled_without_a_tee_is_never_said_to_have_one(assurance: str) -> None:
    lifted = ATTEST.model_copy(update={"assurance": assurance})
    with pytest.raises(Forbidden, check=says_why) as refused:
        decide_attest_provider(after(OPEN_ENROLLED), lifted)
    assert refused.value.code == "tier_mismatch"
    (event,) = decide_attest_provider(after(ENROLLED), lifted)
    assert event.assurance == assurance  # type: ignore[attr-defined]


def test_who_enrolled_with_one_is_not_taken_without() -> None:
    command = AttestProvider.model_validate(OPEN_ATTESTED.model_dump())
    with pytest.raises(Forbidden, check=says_why) as refused:
        decide_attest_provider(after(ENROLLED), command)
    assert refused.value.code == "tier_mismatch"
    assert decide_attest_provider(after(OPEN_ENROLLED), command) == (OPEN_ATTESTED,)


@pytest.mark.parametrize(
    ("former", "next_"), [(ATTESTED, OPEN_ATTESTED), (OPEN_ATTESTED, ATTESTED)]
)
def test_a_key_stays_in_the_tier_that_it_was_made_in(
    former: ProviderAttested, next_: ProviderAttested
) -> None:
    fresh = next_.model_copy(update={"evidence_id": hex32("fresh")})
    assert after(ENROLLED, former, BUNDLE, fresh).bundles == ()
    same = former.model_copy(update={"evidence_id": hex32("fresh")})
    assert after(ENROLLED, former, BUNDLE, same).bundles == (BUNDLE,)


def test_to_enter_or_leave_the_open_tier_ends_what_the_provider_stood_on() -> None:
    revoked = AttestationRevoked(
        provider_id=ALICE.id, evidence_id=ALICE.evidence_id, reason="tier_changed"
    )
    assert decide_enrol_provider(READY, OPEN_ENROL) == (OPEN_ENROLLED, revoked)
    opened = after(OPEN_ENROLLED, OFFER, OPEN_ATTESTED, BUNDLE)
    assert decide_enrol_provider(opened, ENROL) == (ENROLLED, revoked)
    assert decide_enrol_provider(opened, OPEN_ENROL) == ()
    assert decide_enrol_provider(after(ENROLLED), OPEN_ENROL) == (OPEN_ENROLLED,)
    state = evolve(evolve(READY, OPEN_ENROLLED), revoked)
    assert (state.attested, state.bundles) == (None, ())
