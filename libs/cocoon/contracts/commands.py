"""Commands with every input of their decision: what `replay --decisions` runs again.

A command's canonical bytes are stored with its events. It holds the content-free snapshot that
the decider saw (candidates, balance, time, seed), so deciders are functions of the folded stream
and the command alone.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32, Name, Nanoton, Region, TimeMs
from cocoon.contracts.events import (
    BasisPoints,
    Epoch,
    OfferedModel,
    Position,
    ProfiledModel,
    Quote,
    SeedPeriod,
    Shard,
)
from cocoon.contracts.honesty import HonestyRule
from cocoon.contracts.matching import (
    Affinity,
    MatchingPolicy,
    OpenTierLimits,
    PartsPerMillion,
    Preferences,
)
from cocoon.kernel import canonical


class Command(Contract):
    """Base of all commands. `command_type` is stored beside the fields."""

    command_type: ClassVar[str]

    def to_stored(self) -> bytes:
        """Canonical JSON of {"type": ..., "command": {...}}."""
        return b"%b%b%b%b%b" % (
            _BEFORE, self.to_canonical(), _BETWEEN, self.command_type.encode(), _AFTER
        )  # fmt: skip


class Candidate(Contract):
    """A provider as the matcher saw it when it decided: offer, key, attestation, load."""

    provider_id: Name
    key_id: Hex16
    quote: Quote
    evidence_id: Hex32
    signing_key: Hex32
    attested_position: Position
    valid_until_ms: TimeMs  # the earliest of evidence, bundle and collateral
    context_tokens: Count
    running: Count
    concurrency: Count
    first_token_us: Count  # moving average of the time to first token; 0 = no history
    alive: bool
    # not in commands from before matching policies
    tier: Name | None = None
    quantisation: Name | None = None
    region: Name | None = None
    tokens_per_s: Count = 0  # moving average of one answer's output; 0 = no history
    ended_jobs: Count = 0  # that ended well or badly at this provider
    success_ppm: PartsPerMillion = 1_000_000  # moving average of those that ended well


class RequestJob(Command):
    command_type: ClassVar[str] = "RequestJob"
    job_id: Hex16
    account_id: Name
    api_key_id: Name
    gateway_id: Name
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
    available_nanoton: Nanoton
    candidates: tuple[Candidate, ...]
    lease_ttl_ms: TimeMs
    seed: Hex32
    now_ms: TimeMs
    # not in commands from before matching policies
    policy: MatchingPolicy | None = None
    preferences: Preferences | None = None
    affinity: Affinity = ""
    seed_period: Count = 0  # whose secret gave the seed; 0: before there were any
    open_limits: OpenTierLimits | None = None  # None: nobody of the open tier gets the job


class ExpireLease(Command):
    """End the live lease; match again if a candidate and an attempt are left, else fail."""

    command_type: ClassVar[str] = "ExpireLease"
    job_id: Hex16
    epoch: Epoch
    reason: Literal["expired", "silent", "busy", "refused", "rejected", "revoked", "gone"]
    may_rematch: bool
    cancelled: bool  # the client has gone: end as cancelled instead of matching again
    failure: Name  # the reason given if the job fails now
    candidates: tuple[Candidate, ...]
    lease_ttl_ms: TimeMs
    seed: Hex32
    now_ms: TimeMs
    again: bool = False  # whoever was only busy may be chosen again; while all are, nothing ends
    policy: MatchingPolicy | None = None
    preferences: Preferences | None = None
    affinity: Affinity = ""
    seed_period: Count = 0
    open_limits: OpenTierLimits | None = None


class SettleResult(Command):
    command_type: ClassVar[str] = "SettleResult"
    job_id: Hex16
    provider_id: Name
    epoch: Epoch
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]
    blob_hash: Hex32
    response_bytes: Count
    # domain/metering.py's rule; 0 in commands from before there was one
    metering: Annotated[int, Field(ge=0, le=1)] = 0


class OpenAccount(Command):
    command_type: ClassVar[str] = "OpenAccount"
    account_id: Name


class CreditDeposit(Command):
    command_type: ClassVar[str] = "CreditDeposit"
    account_id: Name
    amount_nanoton: Nanoton
    source: Literal["dev", "ton"]
    reference: Name


class EnrolProvider(Command):
    command_type: ClassVar[str] = "EnrolProvider"
    provider_id: Name
    identity_key: Hex32
    tier: Literal["facility", "attested", "simulated", "open"]


class PublishOffer(Command):
    command_type: ClassVar[str] = "PublishOffer"
    provider_id: Name
    models: tuple[OfferedModel, ...]
    concurrency: Annotated[int, Field(ge=1, le=65_536)]


class AttestProvider(Command):
    """A verdict reached by the pure verifier; its inputs are named by their hashes."""

    command_type: ClassVar[str] = "AttestProvider"
    provider_id: Name
    evidence_id: Hex32
    verdict: Name
    assurance: Literal["facility", "attested", "simulated", "open"]
    signing_key: Hex32
    models_root: Hex32
    valid_until_ms: TimeMs
    collateral_hash: Hex32
    policy_hash: Hex32


class RevokeAttestation(Command):
    command_type: ClassVar[str] = "RevokeAttestation"
    provider_id: Name
    evidence_id: Hex32
    reason: Name


class PublishKeyBundle(Command):
    command_type: ClassVar[str] = "PublishKeyBundle"
    provider_id: Name
    key_id: Hex16
    evidence_id: Hex32
    not_before_ms: TimeMs
    not_after_ms: TimeMs
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{2,8192}$")]


class PublishPolicy(Command):
    command_type: ClassVar[str] = "PublishPolicy"
    policy_hash: Hex32
    version: Count
    previous_hash: Hex32 | None
    open_tier: OpenTierLimits | None = None  # None: the policy has no open tier


class PublishProfile(Command):
    command_type: ClassVar[str] = "PublishProfile"
    provider_id: Name
    region: Region
    models: Annotated[tuple[ProfiledModel, ...], Field(max_length=256)]


class CommitMatchingSeed(Command):
    command_type: ClassVar[str] = "CommitMatchingSeed"
    shard: Shard
    period: SeedPeriod
    commitment: Hex32


class RevealMatchingSeed(Command):
    command_type: ClassVar[str] = "RevealMatchingSeed"
    shard: Shard
    period: SeedPeriod
    secret: Hex32 | None


class TakeLedgerSnapshot(Command):
    command_type: ClassVar[str] = "TakeLedgerSnapshot"
    shard: Shard
    position: Annotated[int, Field(ge=1, le=2**53)]
    sha256: Hex32


class JudgeCanary(Command):
    """An auditor's judgement of one job, under the rule that it was judged by."""

    command_type: ClassVar[str] = "JudgeCanary"
    provider_id: Name
    model_id: Hex32
    job_id: Hex16
    outcome: Literal["passed", "differed", "unclear"]
    distance_bps: BasisPoints
    rule: HonestyRule


class LiftHonesty(Command):
    command_type: ClassVar[str] = "LiftHonesty"
    provider_id: Name


class OpenDispute(Command):
    """What a client counted, beside what the receipt says that the match's provider signed."""

    command_type: ClassVar[str] = "OpenDispute"
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


ALL_COMMANDS: tuple[type[Command], ...] = (
    RequestJob, ExpireLease, SettleResult, OpenAccount, CreditDeposit, EnrolProvider,
    PublishOffer, AttestProvider, RevokeAttestation, PublishKeyBundle, PublishPolicy,
    TakeLedgerSnapshot, PublishProfile, CommitMatchingSeed, RevealMatchingSeed,
    JudgeCanary, LiftHonesty, OpenDispute,
)  # fmt: skip
_REGISTRY = {cls.command_type: cls for cls in ALL_COMMANDS}


_BEFORE, _BETWEEN, _AFTER = b'{"command":', b',"type":"', b'"}'


def decode_command(stored: bytes) -> Command:
    """Return the command for stored bytes. Raises KeyError or ValueError for anything else."""
    # As `to_stored` writes them, the bytes between are the command's own: they are parsed once.
    body, _, name = stored.rpartition(_BETWEEN)
    kind = _REGISTRY.get(name.removesuffix(_AFTER).decode("utf-8", "replace"))
    if kind and body.startswith(_BEFORE) and name.endswith(_AFTER):
        return kind.model_validate_json(body[len(_BEFORE) :])
    value = canonical.loads_object(stored, strict=False)
    return _REGISTRY[str(value["type"])].model_validate_json(canonical.dumps(value["command"]))
