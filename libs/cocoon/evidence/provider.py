"""Verify a provider whole: the one function that the attestation service and every client run.

Policy, quote, binding, challenge, models and tier in one verdict. Key bundles pass through as
bytes: whoever uses one checks it against the attested key in the verdict's claims.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from cocoon.contracts.base import Contract, Hex32, Name
from cocoon.evidence import claims as binding
from cocoon.evidence import open_tier
from cocoon.evidence import policy as rules
from cocoon.evidence.claims import Claims, TeeKind
from cocoon.evidence.collateral import MAX_COLLATERAL_BYTES, CollateralFloors
from cocoon.evidence.policy import Policy, SignedPolicy
from cocoon.evidence.tdx import verify_tdx
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Verdict, fail, reject
from cocoon.kernel import canonical
from cocoon.kernel.errors import EvidenceRejected

MAX_EVIDENCE_BYTES = 1024 * 1024
_KINDS = {"tdx": TeeKind.TDX, "snp": TeeKind.SNP, "none": TeeKind.NONE}
MAX_CLOCK_SKEW_MS = 120_000  # how far ahead of ours an enclave's clock may run


def _from_base64(value: object) -> object:
    if isinstance(value, str):
        return base64.b64decode(value, validate=True)  # binascii.Error is a ValueError
    return value


# Bytes in Python, base64 in JSON.
Base64 = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(lambda value: base64.b64encode(value).decode(), when_used="json"),
]


class ProviderEvidence(Contract):
    """What a provider offers as proof, as it travels in the directory."""

    tee: Literal["tdx", "snp", "none"]
    provider_id: Name
    quote: Annotated[Base64, Field(max_length=64 * 1024)]  # none: the open tier's statement
    collateral: Annotated[str, Field(max_length=MAX_COLLATERAL_BYTES)] | None = None
    claims: Annotated[Base64, Field(max_length=1024)]
    models: Annotated[tuple[Hex32, ...], Field(min_length=1, max_length=256)]
    checkpoint_root: Hex32  # with challenge_random: what the challenge was made from
    challenge_random: Hex32
    gpu_reports: Annotated[
        tuple[Annotated[Base64, Field(max_length=64 * 1024)], ...], Field(max_length=16)
    ] = ()
    bundles: Annotated[
        tuple[Annotated[Base64, Field(max_length=4096)], ...], Field(max_length=8)
    ] = ()


def parse_evidence(data: bytes) -> ProviderEvidence:
    """Parse evidence JSON of at most 1 MiB. Raises EvidenceRejected (code `malformed`)."""
    try:
        if len(data) > MAX_EVIDENCE_BYTES:
            raise ValueError  # its text would show nowhere
        return ProviderEvidence.model_validate(canonical.loads_object(data, strict=False))
    except (ValidationError, ValueError):
        refusal = reject("malformed")
        raise EvidenceRejected(
            f"{refusal.sentence} {refusal.next_step}", code=refusal.code
        ) from None


def verify_provider(
    evidence: ProviderEvidence,
    trust: TrustAnchors,
    policy: SignedPolicy,
    floors: CollateralFloors,
    now_ms: int,
) -> Verdict:
    """Decide whether this provider's keys may be used, at `now_ms` (Unix ms).

    Pure: the same inputs give the same verdict for ever. Never raises for bad input. An ok
    verdict carries the attested claims, the tier and how long it holds.
    """
    return (
        _check_policy(policy, trust)
        or _check_scope(evidence, policy.policy)
        or _verify(evidence, trust, policy.policy, floors, now_ms)
    )


def _check_policy(signed: SignedPolicy, trust: TrustAnchors) -> Verdict | None:
    if not rules.verify(signed, trust.policy_signers, trust.policy_threshold):
        return reject("policy_unsigned")
    if signed.policy.network_id != trust.network_id:
        return reject("policy_unsigned", "It is the policy of another network.")
    if signed.policy.network_class == "dev" and not trust.is_dev:
        return reject("dev_anchor", "The policy is of class dev.")
    return None


def _check_scope(evidence: ProviderEvidence, policy: Policy) -> Verdict | None:
    """Kinds of evidence that this version cannot verify are undecided, never ok."""
    if evidence.tee == "none":
        return _check_open_scope(evidence, policy)
    if evidence.tee != "tdx":
        return fail("unsupported", "AMD SEV-SNP is not verified yet.")
    if evidence.gpu_reports:
        return fail("unsupported", "NVIDIA GPU reports are not verified yet.")
    return reject("gpu_missing") if policy.gpu.required else None


def _check_open_scope(evidence: ProviderEvidence, policy: Policy) -> Verdict | None:
    """What only hardware can vouch for has no place beside a provider's own word."""
    if policy.open_rules is None:
        return reject("open_tier")
    if evidence.collateral is not None or evidence.gpu_reports:
        return reject("malformed", "Without a TEE there is neither collateral nor a GPU report.")
    return None


def _verify(
    evidence: ProviderEvidence,
    trust: TrustAnchors,
    policy: Policy,
    floors: CollateralFloors,
    now_ms: int,
) -> Verdict:
    try:
        claims = Claims.decode(evidence.claims)
    except ValueError as error:
        return reject("malformed", f"In detail: {error}.")
    if claims.tee is not _KINDS[evidence.tee]:
        return reject("malformed", "The claims name another kind of machine than the evidence.")
    verdict, covered = _vouched(evidence, trust, policy, floors, now_ms)
    ends_ms = verdict.valid_until_ms
    if not verdict.ok or ends_ms is None:
        return verdict
    if not hmac.compare_digest(covered, binding.report_data(evidence.claims).hex()):
        refusal: Verdict | None = reject("report_data_mismatch")
    else:
        verdict = verdict.with_(claims=claims)
        refusal = _check_claims(claims, evidence, policy, now_ms)
    if refusal:
        return refusal.with_(
            evidence_id=verdict.evidence_id,
            facts=verdict.facts,
            claims=verdict.claims,
            floors=verdict.floors,
        )
    ends_ms = min(ends_ms, claims.not_after_ms, _too_old_ms(claims, policy))
    return verdict.with_(valid_until_ms=ends_ms)


def _vouched(
    evidence: ProviderEvidence,
    trust: TrustAnchors,
    policy: Policy,
    floors: CollateralFloors,
    now_ms: int,
) -> tuple[Verdict, str]:
    """Who vouches for what: the verdict on the hardware, or on the provider's own signature, and
    the report data (hex) that it covers, which means nothing unless the verdict is ok.
    """
    if evidence.tee == "none":
        return open_tier.verify_statement(evidence.quote, evidence.provider_id, policy, now_ms)
    verdict = verify_tdx(evidence.quote, evidence.collateral, trust, policy, now_ms, floors=floors)
    return verdict, verdict.facts.report_data if verdict.facts else ""


def _too_old_ms(claims: Claims, policy: Policy) -> int:
    return claims.not_before_ms + policy.max_evidence_age_s * 1000


def _check_claims(
    claims: Claims, evidence: ProviderEvidence, policy: Policy, now_ms: int
) -> Verdict | None:
    """Time, challenge, models and GPUs of claims that the quote covers."""
    if now_ms + MAX_CLOCK_SKEW_MS < claims.not_before_ms:
        return reject("claims_window", "They begin in the future.")
    if now_ms >= claims.not_after_ms:
        return reject("claims_window", "They have ended.")
    if now_ms >= _too_old_ms(claims, policy):
        return reject("too_old")
    challenge = binding.challenge(
        bytes.fromhex(evidence.checkpoint_root),
        evidence.provider_id,
        bytes.fromhex(evidence.challenge_random),
    )
    if claims.challenge != challenge:
        return reject("nonce")
    if len(set(evidence.models)) != len(evidence.models):
        return reject("models_mismatch", "A model is listed twice.")
    if claims.models_root != binding.models_root(bytes.fromhex(item) for item in evidence.models):
        return reject("models_mismatch")
    if policy.models is not None and not set(evidence.models) <= set(policy.models):
        return reject("model_denied")
    if claims.gpu_evidence_hash != binding.gpu_evidence_hash(evidence.gpu_reports):
        return reject("gpu_missing")
    return None


def collateral_hash(evidence: ProviderEvidence) -> bytes:
    """SHA-256 of the collateral as it was verified (of nothing where there is none).

    With the evidence id and the policy hash, the log names a verdict's inputs by it.
    """
    return hashlib.sha256((evidence.collateral or "").encode()).digest()
