"""Pure decisions of attestation: what a request becomes, and what is refused in which words.

State, evidence and time come in as arguments; events come from cocoon.domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Literal

from cocoon.contracts import commands as c
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import PolicyPublished
from cocoon.contracts.matching import OpenTierLimits
from cocoon.contracts.messages import CanaryRequest, EnrolRequest, OfferRequest, ProfileRequest
from cocoon.domain import decide as domain
from cocoon.domain.honesty import HonestyState
from cocoon.domain.open_tier import OPEN
from cocoon.domain.provider import ProviderState
from cocoon.evidence.policy import OpenTierRules, Policy, SignedPolicy, policy_hash, verify
from cocoon.evidence.provider import ProviderEvidence, collateral_hash
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Outcome, Verdict
from cocoon.kernel import ids
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    EvidenceRejected,
    Forbidden,
    NotFound,
    RateLimited,
    SealingError,
    TooLarge,
    Unavailable,
)
from cocoon.sealing.keys import verify_bundle

RETRY_AFTER_REFUSAL_S = 300  # the provider must change something first
RETRY_UNDECIDED_S = 30
# A directory's entry and the policy travel in one bus message, as JSON inside JSON.
MAX_EVIDENCE_BYTES = 256 * 1024
MAX_POLICY_BYTES = 128 * 1024
_MAX_MESSAGE_CHARS = 1000
NETWORK_POLICY = "policy/network"


# ---- at start ----


def check_environment(environment: str, trust: TrustAnchors, signed: SignedPolicy) -> None:
    """Raises ConfigurationError, in plain words, for rules that this process must not run under."""
    policy = signed.policy
    if environment == "prod":
        if trust.is_dev or any(anchor.is_dev for anchor in trust.anchors):
            raise ConfigurationError(
                "this is a production environment, but the trust file holds a DEV ONLY root or is "
                "of class dev; name the production network's trust file, or set "
                "COCOON_ATTESTATION_ENVIRONMENT=dev"
            )
        if policy.network_class != "prod":
            raise ConfigurationError(
                "this is a production environment, but the policy is of class dev; name the "
                "production network's policy, or set COCOON_ATTESTATION_ENVIRONMENT=dev"
            )
    if policy.network_id != trust.network_id:
        raise ConfigurationError(
            "the policy is of another network than the trust file; take both from one network"
        )
    if policy.network_class != trust.network_class:
        raise ConfigurationError(
            "the policy and the trust file are of different classes (dev, prod); take both from "
            "one network"
        )
    if not verify(signed, trust.policy_signers, trust.policy_threshold):
        raise ConfigurationError(
            f"the policy lacks {trust.policy_threshold} good signature(s) of the trust file's "
            "signers; have it signed again"
        )
    if len(signed.to_canonical()) > MAX_POLICY_BYTES:
        raise ConfigurationError(
            f"the policy is larger than {MAX_POLICY_BYTES // 1024} KiB, too large for the bus; "
            "drop images and bans that no longer matter"
        )
    known = {anchor.fingerprint for anchor in trust.anchors}
    if not set(policy.anchors) <= known:
        raise ConfigurationError(
            "the policy names a vendor root that the trust file does not hold; take both from one "
            "network"
        )


def policy_command(known: PolicyPublished | None, policy: Policy) -> c.PublishPolicy | None:
    """The command that publishes `policy`, None if it is the current one.

    Raises ConfigurationError for an older one, or one that does not follow the current one.
    """
    fresh = policy_hash(policy).hex()
    rules = policy.open_rules
    command = c.PublishPolicy(
        policy_hash=fresh,
        version=policy.version,
        previous_hash=policy.previous_hash,
        open_tier=None if rules is None else OpenTierLimits(
            max_running_jobs=rules.max_running_jobs, max_job_nanoton=rules.max_job_nanoton
        ),
    )  # fmt: skip
    if known is None or (known.policy_hash == fresh and known.version == policy.version):
        return command if known is None else None
    if policy.version <= known.version:
        raise ConfigurationError(
            f"the policy file has version {policy.version}, but the network already runs under "
            f"version {known.version}; take the newest policy"
        )
    if policy.previous_hash != known.policy_hash:
        raise ConfigurationError(
            "the policy does not name the network's current policy as the one before it; sign it "
            "again with previous_hash set to the current policy's hash"
        )
    return command


# ---- what becomes an append ----


def item(
    state: domain.State, version: int, command: c.Command, traceparent: str = ""
) -> AppendItem | None:
    """Decide `command` on its stream's state; None where nothing changes.

    Raises Rejected as the deciders do. The command id names the stream's version, so that the same
    wish at a later time is another command and a repeated append is not.
    """
    stream = domain.stream_of(command)
    events = domain.decide(state, command)
    if not events:
        return None
    stored = command.to_stored()
    # a job is judged once, whatever is said of it later
    named = (
        (command.job_id,)
        if isinstance(command, c.JudgeCanary)
        else (str(version), hashlib.sha256(stored).hexdigest())
    )
    return AppendItem(
        command_id=ids.named_command_id(command.command_type, stream, *named),
        command=stored,
        actor="attestation",
        correlation_id=stream.partition("/")[2],
        expects=((stream, version),),
        events=tuple(NewEvent(stream, event) for event in events),
        traceparent=traceparent,
    )


def enrol_command(provider_id: str, request: EnrolRequest, policy: Policy) -> c.EnrolProvider:
    """Raises Forbidden unless the id is that of the identity key, and for a provider without a TEE
    where the policy has no open tier.
    """
    if ids.provider_id(bytes.fromhex(request.identity_key)) != provider_id:
        raise Forbidden(
            "the identity key does not belong to this provider id; connect with the key that you "
            "enrol",
            code="identity_mismatch",
        )
    tier: Literal["simulated", "attested", "open"] = (
        "simulated" if policy.network_class == "dev" else "attested"
    )
    if request.tier == OPEN:
        open_rules(policy)
        tier = OPEN
    return c.EnrolProvider(provider_id=provider_id, identity_key=request.identity_key, tier=tier)


def open_rules(policy: Policy) -> OpenTierRules:
    """Raises Forbidden where the policy takes no provider without a TEE."""
    rules = policy.open_rules
    if rules is None:
        raise Forbidden(
            "this network's policy takes no provider without a TEE; run the agent on an Intel TDX "
            "machine, or ask the network's operator for a policy with an open tier",
            code="open_tier",
        )
    return rules


def check_open_places(policy: Policy, provider_id: str, standing: Collection[str]) -> None:
    """Raises RateLimited when as many others stand in the open tier as the policy takes.

    `standing`: the ids of the providers that stand in it.
    """
    others = len(set(standing) - {provider_id})
    if others >= open_rules(policy).max_providers:
        raise RateLimited(
            f"the open tier has all {others} providers that this network's policy takes; try "
            "again later, or run the agent on an Intel TDX machine",
            code="open_tier_full",
            retry_after_s=RETRY_AFTER_REFUSAL_S,
        )


def check_kind(state: ProviderState, evidence: ProviderEvidence) -> None:
    """Raises Forbidden for evidence of another tier than the provider enrolled for."""
    is_open = state.enrolled is not None and state.enrolled.tier == OPEN
    if is_open != (evidence.tee == "none"):
        raise Forbidden(
            "the provider enrolled for the open tier and sends a quote, or enrolled with a TEE and "
            "sends none; enrol again for what the machine is",
            code="tier_mismatch",
        )


def require_enrolled(state: ProviderState | None) -> ProviderState:
    if state is None or state.enrolled is None:
        raise NotFound("this provider has not enrolled; enrol first", code="not_enrolled")
    return state


def offer_command(
    provider_id: str, request: OfferRequest, policy: Policy, attested: ProviderEvidence | None
) -> c.PublishOffer:
    """Raises BadRequest or Forbidden for an offer that no client could take."""
    if not request.models:
        raise BadRequest("an offer names at least one model", code="empty_offer")
    model_ids = {model.model_id for model in request.models}
    names = {model.name for model in request.models}
    if len(model_ids) < len(request.models) or len(names) < len(request.models):
        raise BadRequest("an offer names each model once", code="repeated_model")
    if policy.models is not None and not model_ids <= set(policy.models):
        raise Forbidden(
            "the policy does not list one of these models; offer a listed one, or have it listed",
            code="model_denied",
        )
    if attested is not None and not model_ids <= set(attested.models):
        raise Forbidden(
            "the evidence does not cover one of these models; attest with it, then offer it",
            code="models_mismatch",
        )
    return c.PublishOffer(
        provider_id=provider_id, models=request.models, concurrency=request.concurrency
    )


def profile_command(provider_id: str, request: ProfileRequest) -> c.PublishProfile:
    return c.PublishProfile(provider_id=provider_id, region=request.region, models=request.models)


def check_size(evidence: ProviderEvidence) -> None:
    """Raises TooLarge for evidence that the directory could not carry."""
    if len(evidence.to_canonical()) > MAX_EVIDENCE_BYTES:
        raise TooLarge(
            f"the evidence is larger than {MAX_EVIDENCE_BYTES // 1024} KiB; send the collateral of "
            "one FMSPC only, without a certificate chain of its own",
            code="evidence_too_large",
        )


def attest_command(
    evidence: ProviderEvidence, verdict: Verdict, policy: Policy
) -> c.AttestProvider:
    """Record an ok verdict. Raises EvidenceRejected or Unavailable for any other."""
    if (
        not verdict.ok
        or verdict.claims is None
        or verdict.evidence_id is None
        or verdict.assurance is None
        or verdict.valid_until_ms is None
    ):
        raise refusal(verdict)
    return c.AttestProvider(
        provider_id=evidence.provider_id,
        evidence_id=verdict.evidence_id.hex(),
        verdict=str(verdict),
        assurance=verdict.assurance.value,
        signing_key=verdict.claims.ed25519_public.hex(),
        models_root=verdict.claims.models_root.hex(),
        valid_until_ms=verdict.valid_until_ms,
        collateral_hash=collateral_hash(evidence).hex(),
        policy_hash=policy_hash(policy).hex(),
    )


def bundle_command(state: ProviderState, raw: bytes, now_ms: int) -> c.PublishKeyBundle:
    """Check a signed bundle by the attested key. Raises Forbidden with CAI/1's code."""
    provider = require_enrolled(state).enrolled
    attested = state.attested
    if attested is None or provider is None:
        raise Forbidden(
            "this provider is not attested now; send evidence, then the key bundle",
            code="not_attested",
        )
    try:
        bundle = verify_bundle(
            raw,
            ed25519_pk=bytes.fromhex(attested.signing_key),
            evidence_id=bytes.fromhex(attested.evidence_id),
            now_ms=now_ms,
        )
    except SealingError as error:
        raise Forbidden(
            f"the key bundle was refused ({error.code}); sign a new one by the attested key, "
            "under the current evidence and for the current time",
            code=error.code,
        ) from None
    return c.PublishKeyBundle(
        provider_id=provider.provider_id,
        key_id=bundle.key_id.hex(),
        evidence_id=attested.evidence_id,
        not_before_ms=bundle.not_before_ms,
        not_after_ms=bundle.not_after_ms,
        bundle=raw.hex(),
    )


def check_key(holder: str | None, provider_id: str) -> None:
    """Raises Forbidden for a key that another provider announced: whoever sees one can name it."""
    if holder is not None and holder != provider_id:
        raise Forbidden(
            "another provider announced this key; make a key of your own and announce that",
            code="key_taken",
        )


# ---- refusals ----


def refusal(verdict: Verdict) -> CocoonError:
    """The provider's answer to a verdict that is not ok: code, sentence, remedy, when again."""
    message = f"{verdict.sentence} {verdict.next_step}"[:_MAX_MESSAGE_CHARS]
    if verdict.outcome is Outcome.REJECT:
        return EvidenceRejected(message, code=verdict.code, retry_after_s=RETRY_AFTER_REFUSAL_S)
    return Unavailable(message, code=verdict.code, retry_after_s=RETRY_UNDECIDED_S)


def check_ban(bans: Mapping[str, str], provider_id: str, ppid: str = "") -> None:
    """Raises EvidenceRejected (banned) for a provider or a machine that an operator banned."""
    if provider_id in bans or (ppid and ppid in bans.values()):
        raise EvidenceRejected(
            "The machine or this provider is banned by the network's operator. Ask the operator; "
            "until the ban is lifted, nothing from it is taken.",
            code="banned",
            retry_after_s=3600,
        )


def check_honest(known: HonestyState | None) -> None:
    """Raises EvidenceRejected (canary) for a provider that canaries found to cheat."""
    if known is not None and known.dishonest:
        raise EvidenceRejected(
            "Audit jobs found that this provider's answers are not those of the model that it "
            "offers, or that it counts tokens which are not there. Serve the manifest's own files, "
            "and ask the operator to lift this.",
            code="canary",
            retry_after_s=3600,
        )


def judge_command(request: CanaryRequest, known: ProviderState | None) -> c.JudgeCanary:
    """Raises NotFound for a provider that never enrolled."""
    require_enrolled(known or ProviderState())
    return c.JudgeCanary(**request.model_dump())


def told_of_honesty(
    known: HonestyState, model_id: str, position: int, revoked: int
) -> dict[str, object]:
    """How the model's test stands."""
    test = known.test(model_id)
    return {
        "position": position,
        "verdict": "dishonest" if model_id in known.dishonest else "open",
        "judged": test.judged if test else 0,
        "differed": test.differed if test else 0,
        "revoked": revoked,
    }


def revoke_command(provider_id: str, evidence_id: str, reason: str) -> c.RevokeAttestation:
    return c.RevokeAttestation(provider_id=provider_id, evidence_id=evidence_id, reason=reason)
