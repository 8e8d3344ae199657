"""Every event that the log holds: one frozen model per (type, version), never edited, only added.

`data` holds ids, digests, sizes and integers; never a prompt, a result or a person's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32, Name, Nanoton, Region, TimeMs
from cocoon.contracts.honesty import HonestyRule
from cocoon.contracts.matching import OpenTierLimits

Position = Annotated[int, Field(ge=0, le=2**53)]
BasisPoints = Annotated[int, Field(ge=0, le=10_000)]
Epoch = Annotated[int, Field(ge=1, le=2**32 - 1)]
Shard = Annotated[int, Field(ge=1, le=2**31 - 1)]  # of accounts
SeedPeriod = Annotated[int, Field(ge=1, le=2**32 - 1)]


class EventData(Contract):
    """Base of all events' data. `event_type` is the class's name unless a version suffixes it."""

    event_type: ClassVar[str]
    schema_version: ClassVar[int] = 1


class Quote(Contract):
    """Price terms, copied whole into the match: nanoTON per million tokens, fee in basis points."""

    model_id: Hex32
    input_nanoton_per_mtok: Nanoton
    cached_input_nanoton_per_mtok: Nanoton
    output_nanoton_per_mtok: Nanoton
    fee_bps: BasisPoints


# ---- the job: stream job/<job_id>, account shards ----


class JobRequested(EventData):
    event_type: ClassVar[str] = "JobRequested"
    job_id: Hex16
    account_id: Name
    api_key_id: Name
    gateway_id: Name  # where a new match is announced
    model_id: Hex32
    req_hash: Hex32
    envelope_bytes: Count
    max_price_nanoton: Nanoton
    max_input_tokens: Count
    max_output_tokens: Count
    not_after_ms: TimeMs
    policy_hash: Hex32
    recipient_key_ids: tuple[Hex16, ...]
    stream: bool


class FundsHeld(EventData):
    event_type: ClassVar[str] = "FundsHeld"
    job_id: Hex16
    account_id: Name
    amount_nanoton: Nanoton


class FundsRefused(EventData):
    event_type: ClassVar[str] = "FundsRefused"
    job_id: Hex16
    account_id: Name
    needed_nanoton: Nanoton
    available_nanoton: Nanoton


class ProviderMatched(EventData):
    event_type: ClassVar[str] = "ProviderMatched"
    job_id: Hex16
    provider_id: Name
    epoch: Epoch
    key_id: Hex16
    lease_ttl_ms: TimeMs
    quote: Quote
    quote_id: Hex32
    evidence_id: Hex32
    signing_key: Hex32
    attested_position: Position


class LeaseExpired(EventData):
    event_type: ClassVar[str] = "LeaseExpired"
    job_id: Hex16
    provider_id: Name
    epoch: Epoch
    reason: Literal["expired", "silent", "busy", "refused", "rejected", "revoked", "gone"]
    counts: bool  # whether the epoch counts against the job's three attempts (a busy one does not)


class JobFailed(EventData):
    event_type: ClassVar[str] = "JobFailed"
    job_id: Hex16
    account_id: Name
    reason: Name
    released_nanoton: Nanoton


class JobCancelled(EventData):
    event_type: ClassVar[str] = "JobCancelled"
    job_id: Hex16
    account_id: Name
    released_nanoton: Nanoton


class ResultSealed(EventData):
    event_type: ClassVar[str] = "ResultSealed"
    job_id: Hex16
    provider_id: Name
    epoch: Epoch
    status: Literal["complete", "length", "cancelled", "refused", "failed"]
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]  # 420 bytes, public
    resp_hash: Hex32
    blob_hash: Hex32  # SHA-256 of all response bytes: the blob's name in SEALED
    response_bytes: Count
    input_tokens: Count
    cached_input_tokens: Count
    output_tokens: Count
    reasoning_tokens: Count


class ResultRejected(EventData):
    event_type: ClassVar[str] = "ResultRejected"
    job_id: Hex16
    provider_id: Name
    epoch: Epoch
    reason: Name
    receipt_hash: Hex32


class PaymentSettled(EventData):
    event_type: ClassVar[str] = "PaymentSettled"
    job_id: Hex16
    account_id: Name
    api_key_id: Name
    provider_id: Name
    epoch: Epoch
    quote_id: Hex32
    held_nanoton: Nanoton
    price_nanoton: Nanoton
    provider_nanoton: Nanoton
    fee_nanoton: Nanoton
    released_nanoton: Nanoton


# ---- accounts: stream account/<account_id>, account shards ----


class AccountOpened(EventData):
    event_type: ClassVar[str] = "AccountOpened"
    account_id: Name


class DepositCredited(EventData):
    event_type: ClassVar[str] = "DepositCredited"
    account_id: Name
    amount_nanoton: Nanoton
    source: Literal["dev", "ton"]
    reference: Name


# ---- the ledger: stream ledger/<shard>, account shards ----


class LedgerSnapshotTaken(EventData):
    event_type: ClassVar[str] = "LedgerSnapshotTaken"
    shard: Shard
    position: Annotated[int, Field(ge=1, le=2**53)]  # the last one that the books hold
    sha256: Hex32  # of the books there, as `cocoon replay --to` prints it


# ---- the seeds of matching: stream matching/<shard>, account shards ----


class MatchingSeedCommitted(EventData):
    event_type: ClassVar[str] = "MatchingSeedCommitted"
    shard: Shard
    period: SeedPeriod  # dense from 1
    commitment: Hex32  # SHA-256 of "cocoon matching secret\0" and the period's secret


class MatchingSeedRevealed(EventData):
    event_type: ClassVar[str] = "MatchingSeedRevealed"
    shard: Shard
    period: SeedPeriod
    secret: Hex32 | None  # None: it was lost, and the period's draws cannot be checked


# ---- providers and policy: shard 0 ----


class ProviderEnrolled(EventData):
    event_type: ClassVar[str] = "ProviderEnrolled"
    provider_id: Name
    identity_key: Hex32
    tier: Literal["facility", "attested", "simulated", "open"]


class OfferedModel(Contract):
    model_id: Hex32
    name: Name
    context_tokens: Count
    input_nanoton_per_mtok: Nanoton
    cached_input_nanoton_per_mtok: Nanoton
    output_nanoton_per_mtok: Nanoton


class OfferPublished(EventData):
    event_type: ClassVar[str] = "OfferPublished"
    provider_id: Name
    models: tuple[OfferedModel, ...]
    concurrency: Annotated[int, Field(ge=1, le=65_536)]


class ProfiledModel(Contract):
    model_id: Hex32
    quantisation: Name  # as its manifest has it, whose hash is the model id


class ProviderProfilePublished(EventData):
    event_type: ClassVar[str] = "ProviderProfilePublished"
    provider_id: Name
    region: Region  # the provider's own word
    models: Annotated[tuple[ProfiledModel, ...], Field(max_length=256)]


class ProviderAttested(EventData):
    event_type: ClassVar[str] = "ProviderAttested"
    provider_id: Name
    evidence_id: Hex32
    verdict: Name
    assurance: Literal["facility", "attested", "simulated", "open"]
    signing_key: Hex32
    models_root: Hex32
    valid_until_ms: TimeMs
    collateral_hash: Hex32
    policy_hash: Hex32


class AttestationRevoked(EventData):
    event_type: ClassVar[str] = "AttestationRevoked"
    provider_id: Name
    evidence_id: Hex32
    reason: Name


class KeyBundlePublished(EventData):
    event_type: ClassVar[str] = "KeyBundlePublished"
    provider_id: Name
    key_id: Hex16
    evidence_id: Hex32
    not_before_ms: TimeMs
    not_after_ms: TimeMs
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{2,8192}$")]  # the signed bundle's bytes


class PolicyPublished(EventData):
    event_type: ClassVar[str] = "PolicyPublished"
    policy_hash: Hex32
    version: Count
    previous_hash: Hex32 | None


class OpenTierLimitsSet(EventData):
    """Before the PolicyPublished that it belongs to. A policy without one has no open tier."""

    event_type: ClassVar[str] = "OpenTierLimitsSet"
    policy_hash: Hex32
    limits: OpenTierLimits


# ---- honesty: stream honesty/<provider_id>, shard 0; dispute/<job_id>, account shards ----


class CanaryJudged(EventData):
    """An audit job's answer against the trusted reference's; unclear says nothing."""

    event_type: ClassVar[str] = "CanaryJudged"
    provider_id: Name
    model_id: Hex32
    job_id: Hex16
    outcome: Literal["passed", "differed", "unclear"]
    distance_bps: BasisPoints
    rule: HonestyRule


class HonestyDecided(EventData):
    """What the sequential test says of a provider and a model; the next test begins anew."""

    event_type: ClassVar[str] = "HonestyDecided"
    provider_id: Name
    model_id: Hex32
    verdict: Literal["honest", "dishonest"]
    judged: Count
    differed: Count


class HonestyLifted(EventData):
    """An operator takes a provider back: its verdicts and running tests are forgotten."""

    event_type: ClassVar[str] = "HonestyLifted"
    provider_id: Name


class DisputeOpened(EventData):
    """A client counted fewer tokens than a receipt that its provider signed. A claim, no proof."""

    event_type: ClassVar[str] = "DisputeOpened"
    job_id: Hex16
    account_id: Name
    provider_id: Name
    epoch: Epoch
    kind: Literal["input_tokens", "output_tokens"]
    counted_by: Literal["tokenizer", "bytes"]
    claimed_input_tokens: Count
    claimed_output_tokens: Count
    claimed_reasoning_tokens: Count
    own_input_tokens: Count
    own_output_tokens: Count
    receipt_hash: Hex32


ALL_EVENTS: tuple[type[EventData], ...] = (
    JobRequested, FundsHeld, FundsRefused, ProviderMatched, LeaseExpired, JobFailed, JobCancelled,
    ResultSealed, ResultRejected, PaymentSettled, AccountOpened, DepositCredited,
    LedgerSnapshotTaken, ProviderEnrolled, OfferPublished, ProviderAttested, AttestationRevoked,
    KeyBundlePublished, PolicyPublished, OpenTierLimitsSet, ProviderProfilePublished,
    MatchingSeedCommitted, MatchingSeedRevealed,
    CanaryJudged, HonestyDecided, HonestyLifted, DisputeOpened,
)  # fmt: skip

_DECODERS: dict[tuple[str, int], Callable[[bytes | str], EventData]] = {
    (cls.event_type, cls.schema_version): cls.__pydantic_validator__.validate_json
    for cls in ALL_EVENTS
}
JOB_ENDS = ("PaymentSettled", "FundsRefused", "JobFailed", "JobCancelled")


def decode_event(event_type: str, schema_version: int, data: bytes | str) -> EventData:
    """Return the model for stored bytes, upcast to the newest version.

    Raises KeyError for an unknown (type, version) and pydantic.ValidationError for bad data.
    """
    return decoder(event_type, schema_version)(data)


def decoder(event_type: str, schema_version: int) -> Callable[[bytes | str], EventData]:
    """What decodes data of this type and version, as `decode_event` does. Raises KeyError."""
    return _DECODERS[event_type, schema_version]
