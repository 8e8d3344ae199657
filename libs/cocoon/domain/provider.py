"""A provider as shard 0 tells it: enrolled, attested, with an offer and current key bundles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cocoon.contracts.commands import (
    AttestProvider,
    EnrolProvider,
    PublishKeyBundle,
    PublishOffer,
    PublishProfile,
    RevokeAttestation,
)
from cocoon.contracts.events import (
    AttestationRevoked,
    EventData,
    KeyBundlePublished,
    OfferPublished,
    ProviderAttested,
    ProviderEnrolled,
    ProviderProfilePublished,
)
from cocoon.domain.open_tier import OPEN
from cocoon.kernel.errors import BadRequest, Conflict, Forbidden, NotFound

MAX_BUNDLES = 4  # the current epoch, the next, and those that still run out


@dataclass(frozen=True, slots=True)
class ProviderState:
    enrolled: ProviderEnrolled | None = None
    offer: OfferPublished | None = None
    attested: ProviderAttested | None = None  # None also after a revocation
    bundles: tuple[KeyBundlePublished, ...] = ()
    version: int = 0
    profile: ProviderProfilePublished | None = None

    @property
    def region(self) -> str | None:
        """Where it says that it is."""
        return self.profile.region or None if self.profile else None

    def quantisation(self, model_id: str) -> str | None:
        """How it says that a model of its is quantised."""
        models = self.profile.models if self.profile else ()
        return next((m.quantisation for m in models if m.model_id == model_id), None)


def evolve(state: ProviderState, event: EventData) -> ProviderState:
    state = replace(state, version=state.version + 1)
    match event:
        case ProviderEnrolled():
            return replace(state, enrolled=event)
        case OfferPublished():
            return replace(state, offer=event)
        case ProviderProfilePublished():
            return replace(state, profile=event)
        case ProviderAttested():
            return replace(state, attested=event, bundles=_kept_bundles(state, event))
        case AttestationRevoked():
            return replace(state, attested=None, bundles=())
        case KeyBundlePublished():
            return replace(state, bundles=(*state.bundles, event)[-MAX_BUNDLES:])
        case _:
            return state


def _kept_bundles(state: ProviderState, event: ProviderAttested) -> tuple[KeyBundlePublished, ...]:
    """The keys that stay usable under new evidence, until they end.

    Those of the former evidence stay only for the same boot (its signing key, which the new
    evidence attests too) under the same policy, and no longer than that evidence held. A key that
    was made without a TEE never becomes one of a better tier, nor the other way round.
    """
    former = state.attested
    renewed = (
        former is not None
        and former.signing_key == event.signing_key
        and former.policy_hash == event.policy_hash
        and (former.assurance == OPEN) == (event.assurance == OPEN)
    )
    return tuple(
        bundle
        for bundle in state.bundles
        if bundle.evidence_id == event.evidence_id
        or (renewed and former is not None and bundle.not_after_ms <= former.valid_until_ms)
    )


def decide_enrol_provider(state: ProviderState, command: EnrolProvider) -> tuple[EventData, ...]:
    """Enrol once. Raises Conflict if the id is taken by another key.

    Who goes to the open tier or comes from it stands on no evidence until it attests as such.
    """
    event = ProviderEnrolled(
        provider_id=command.provider_id, identity_key=command.identity_key, tier=command.tier
    )
    if state.enrolled is not None and state.enrolled.identity_key != command.identity_key:
        raise Conflict("this provider id belongs to another identity key", code="identity_taken")
    if event == state.enrolled:
        return ()
    standing = state.attested
    if standing is not None and (standing.assurance == OPEN) != (event.tier == OPEN):
        revoked = AttestationRevoked(
            provider_id=event.provider_id, evidence_id=standing.evidence_id, reason="tier_changed"
        )
        return (event, revoked)
    return (event,)


def _require_enrolled(state: ProviderState) -> ProviderEnrolled:
    if state.enrolled is None:
        raise NotFound("this provider has not enrolled; run `cocoon provider run` again")
    return state.enrolled


def decide_publish_offer(state: ProviderState, command: PublishOffer) -> tuple[EventData, ...]:
    """Publish models, prices and concurrency; an unchanged offer writes nothing."""
    _require_enrolled(state)
    event = OfferPublished(
        provider_id=command.provider_id, models=command.models, concurrency=command.concurrency
    )
    return () if event == state.offer else (event,)


def decide_publish_profile(state: ProviderState, command: PublishProfile) -> tuple[EventData, ...]:
    """Publish region and quantisations; what is unchanged writes nothing."""
    _require_enrolled(state)
    if len({model.model_id for model in command.models}) < len(command.models):
        raise BadRequest("a profile names each model once", code="repeated_model")
    event = ProviderProfilePublished(**dict(command))
    return () if event == state.profile else (event,)


def decide_attest_provider(state: ProviderState, command: AttestProvider) -> tuple[EventData, ...]:
    """Record an ok verdict. Raises Forbidden for one that is not ok, or of a provider that enrolled
    without a TEE and is said to have one, or the other way round: fail closed.
    """
    enrolled = _require_enrolled(state)
    if not (command.verdict == "ok" or command.verdict.startswith("ok:")):
        raise Forbidden(f"the evidence was refused: {command.verdict}", code="evidence_rejected")
    if (enrolled.tier == OPEN) != (command.assurance == OPEN):
        raise Forbidden(
            f"the provider enrolled as {enrolled.tier} and its evidence is {command.assurance}; "
            "enrol again for the tier of the evidence",
            code="tier_mismatch",
        )
    event = ProviderAttested(**command.model_dump())
    return () if event == state.attested else (event,)


def decide_revoke_attestation(
    state: ProviderState, command: RevokeAttestation
) -> tuple[EventData, ...]:
    """Revoke the named evidence if it is the current one."""
    if state.attested is None or state.attested.evidence_id != command.evidence_id:
        return ()
    return (AttestationRevoked(**command.model_dump()),)


def decide_publish_bundle(state: ProviderState, command: PublishKeyBundle) -> tuple[EventData, ...]:
    """Publish an epoch's key under the current evidence. Raises Forbidden under any other."""
    if state.attested is None or state.attested.evidence_id != command.evidence_id:
        raise Forbidden(
            "the key bundle names evidence that is not the current one; attest again",
            code="stale_evidence",
        )
    if any(bundle.key_id == command.key_id for bundle in state.bundles):
        return ()
    return (KeyBundlePublished(**command.model_dump()),)
