"""Jobs, accounts and providers made from counted bytes, and receipts signed with real keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from nacl.signing import SigningKey

from cocoon.contracts.commands import Candidate, ExpireLease, RequestJob, SettleResult
from cocoon.contracts.events import (
    EventData,
    KeyBundlePublished,
    OfferedModel,
    OfferPublished,
    ProviderAttested,
    ProviderEnrolled,
    ProviderMatched,
    Quote,
)
from cocoon.contracts.messages import Heartbeat, JobRequest, SubmitResult, submission_bytes
from cocoon.domain import pricing
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.kernel.ids import provider_id
from cocoon.sealing.receipt import CHAIN_START, Receipt, Status

NOW_MS = 1_790_000_000_000
NOT_AFTER_MS = NOW_MS + 60_000
LEASE_TTL_MS = 10_000
FEE_BPS = 500


def bytes32(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def hex32(text: str) -> str:
    return bytes32(text).hex()


def hex16(text: str) -> str:
    return bytes32(text)[:16].hex()


MODEL = hex32("model")
POLICY = hex32("policy")
SEED = hex32("seed")
OFFERED = OfferedModel(
    model_id=MODEL, name="skills-1", context_tokens=8192, input_nanoton_per_mtok=1_000_000,
    cached_input_nanoton_per_mtok=250_000, output_nanoton_per_mtok=4_000_000,
)  # fmt: skip
QUOTE = Quote(
    model_id=MODEL, input_nanoton_per_mtok=1_000_000, cached_input_nanoton_per_mtok=250_000,
    output_nanoton_per_mtok=4_000_000, fee_bps=FEE_BPS,
)  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """A provider with its two keys: identity (the agent's) and signing (the enclave's)."""

    name: str
    concurrency: int = 2
    identity: SigningKey = field(init=False, repr=False)
    signer: SigningKey = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", SigningKey(bytes32(f"identity {self.name}")))
        object.__setattr__(self, "signer", SigningKey(bytes32(f"signer {self.name}")))

    @property
    def id(self) -> str:
        return provider_id(bytes(self.identity.verify_key))

    @property
    def key_id(self) -> str:
        return hex16(f"key {self.name}")

    @property
    def evidence_id(self) -> str:
        return hex32(f"evidence {self.name}")

    @property
    def signing_key(self) -> str:
        return bytes(self.signer.verify_key).hex()

    def candidate(self, **changes: object) -> Candidate:
        fields: dict[str, object] = {
            "provider_id": self.id, "key_id": self.key_id, "quote": QUOTE,
            "evidence_id": self.evidence_id, "signing_key": self.signing_key,
            "attested_position": 3, "valid_until_ms": NOT_AFTER_MS + 600_000,
            "context_tokens": 8192, "running": 0, "concurrency": self.concurrency,
            "first_token_us": 0, "alive": True, **changes,
        }  # fmt: skip
        return Candidate.model_validate(fields)

    def network_events(self, model_id: str = MODEL) -> list[EventData]:
        """What shard 0 holds of a provider that can be matched."""
        offered = OFFERED.model_copy(update={"model_id": model_id})
        return [
            ProviderEnrolled(
                provider_id=self.id,
                identity_key=bytes(self.identity.verify_key).hex(),
                tier="simulated",
            ),
            OfferPublished(provider_id=self.id, models=(offered,), concurrency=self.concurrency),
            ProviderAttested(
                provider_id=self.id, evidence_id=self.evidence_id, verdict="ok",
                assurance="simulated", signing_key=self.signing_key, models_root=hex32("models"),
                valid_until_ms=NOT_AFTER_MS + 600_000, collateral_hash=hex32("collateral"),
                policy_hash=POLICY,
            ),
            KeyBundlePublished(
                provider_id=self.id, key_id=self.key_id, evidence_id=self.evidence_id,
                not_before_ms=NOW_MS - 1000, not_after_ms=NOT_AFTER_MS + 600_000, bundle="00",
            ),
        ]  # fmt: skip

    def beat(
        self,
        *running: tuple[str, int],
        boot: str = "boot 1",
        sequence: int = 1,
        draining: bool = False,
    ) -> Heartbeat:
        return Heartbeat(
            provider_id=self.id, boot_id=hex16(f"{self.name} {boot}"), sequence=sequence,
            running=running, concurrency=self.concurrency, draining=draining,
        )  # fmt: skip

    def submit(self, job_id: str, epoch: int, receipt: bytes) -> SubmitResult:
        """A submission signed by the identity key."""
        blob_hash = hex32("blob")
        signed = submission_bytes(self.id, job_id, epoch, receipt.hex(), blob_hash)
        return SubmitResult(
            provider_id=self.id, job_id=job_id, epoch=epoch, receipt=receipt.hex(),
            blob_hash=blob_hash, response_bytes=2048,
            signature=self.identity.sign(signed).signature.hex(),
        )  # fmt: skip


ALICE, BOB, CAROL = Provider("alice"), Provider("bob"), Provider("carol")
PROVIDERS = (ALICE, BOB, CAROL)


def job_request(
    job: str = "job", *, account: str = "acct_1", providers: tuple[Provider, ...] = PROVIDERS,
    **changes: object,
) -> JobRequest:  # fmt: skip
    fields: dict[str, object] = {
        "gateway_id": "gw1", "command_id": f"request-{account}-{job}", "job_id": hex16(job),
        "account_id": account, "api_key_id": "key_1", "model_id": MODEL,
        "req_hash": hex32(f"request {job}"), "envelope_bytes": 4096,
        "max_price_nanoton": 10_000, "max_input_tokens": 1000, "max_output_tokens": 1000,
        "not_after_ms": NOT_AFTER_MS, "policy_hash": POLICY,
        "recipient_key_ids": tuple(p.key_id for p in providers), "stream": False, **changes,
    }  # fmt: skip
    return JobRequest.model_validate(fields)


def request_command(
    job: str = "job", *, providers: tuple[Provider, ...] = PROVIDERS,
    candidates: tuple[Candidate, ...] | None = None, **changes: object,
) -> RequestJob:  # fmt: skip
    asked = job_request(job, providers=providers).model_dump(exclude={"command_id"})
    fields: dict[str, object] = {
        **asked, "available_nanoton": 1_000_000,
        "candidates": tuple(p.candidate() for p in providers) if candidates is None else candidates,
        "lease_ttl_ms": LEASE_TTL_MS, "seed": SEED, "now_ms": NOW_MS, **changes,
    }  # fmt: skip
    return RequestJob.model_validate(fields)


def expire_command(job: str = "job", epoch: int = 1, **changes: object) -> ExpireLease:
    fields: dict[str, object] = {
        "job_id": hex16(job), "epoch": epoch, "reason": "expired", "may_rematch": True,
        "cancelled": False, "failure": "provider_lost",
        "candidates": tuple(p.candidate() for p in PROVIDERS), "lease_ttl_ms": LEASE_TTL_MS,
        "seed": SEED, "now_ms": NOW_MS, **changes,
    }  # fmt: skip
    return ExpireLease.model_validate(fields)


def matched_job(job: str = "job", **changes: object) -> JobState:
    """A job that was just matched, as its events tell it."""
    return fold(decide_request_job(JobState(), request_command(job, **changes)))  # type: ignore[arg-type]


def provider_of(match: ProviderMatched) -> Provider:
    return next(p for p in PROVIDERS if p.id == match.provider_id)


def receipt_for(state: JobState, **changes: object) -> Receipt:
    """The right receipt for the live match: 100 input (20 cached) and 50 output tokens."""
    request, match = state.request, state.match
    assert request is not None
    assert match is not None
    counts = pricing.TokenCounts(input=100, cached_input=20, output=50, reasoning=5)
    receipt = Receipt(
        status=Status.COMPLETE, job_id=bytes.fromhex(request.job_id), epoch=match.epoch,
        key_id=bytes.fromhex(match.key_id), model_id=bytes.fromhex(request.model_id),
        quote_id=bytes.fromhex(match.quote_id), req_hash=bytes.fromhex(request.req_hash),
        resp_hash=bytes32("response"), prompt_commit=bytes32("prompt"),
        output_commit=bytes32("output"), input_tokens=100, cached_input_tokens=20,
        output_tokens=50, reasoning_tokens=5, price_nanoton=pricing.price(match.quote, counts),
        opened_ms=NOW_MS, first_ms=NOW_MS + 1, last_ms=NOW_MS + 2,
        evidence_id=bytes.fromhex(match.evidence_id), seq=0, prev_receipt_hash=CHAIN_START,
    )  # fmt: skip
    return replace(receipt, **changes)  # type: ignore[arg-type]


def settle_command(
    state: JobState, *, signer: SigningKey | None = None, provider: Provider | None = None,
    epoch: int | None = None, receipt_epoch: int | None = None, **changes: object,
) -> SettleResult:  # fmt: skip
    """The submission of the live match's provider, or with something wrong about it."""
    assert state.match is not None
    assert state.request is not None
    author = provider or provider_of(state.match)
    if receipt_epoch is not None:
        changes["epoch"] = receipt_epoch
    receipt = receipt_for(state, **changes).sign(signer or author.signer)
    return SettleResult(
        job_id=state.request.job_id, provider_id=author.id,
        epoch=state.epoch if epoch is None else epoch, receipt=receipt.hex(),
        blob_hash=hex32("blob"), response_bytes=2048,
    )  # fmt: skip
