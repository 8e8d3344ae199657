"""One plausible example of every event, in the order of ALL_EVENTS; and stored rows of them."""

from __future__ import annotations

from collections.abc import Iterable

from cocoon.contracts import events as e
from cocoon.contracts.envelope import AppendItem, NewEvent, StoredEvent
from cocoon.contracts.matching import OpenTierLimits
from cocoon.domain.honesty import make_rule
from tests.support.job_world import ALICE, MODEL, POLICY, QUOTE, hex16, hex32
from tests.support.model_log import ModelLog

JOB = hex16("job")


def settlement(*, held: int, price: int, provider: int, fee: int) -> e.PaymentSettled:
    return e.PaymentSettled(
        job_id=JOB, account_id="acct_1", api_key_id="key_1", provider_id="prov_1", epoch=1,
        quote_id=hex32("quote"), held_nanoton=held, price_nanoton=price,
        provider_nanoton=provider, fee_nanoton=fee, released_nanoton=held - price,
    )  # fmt: skip


CANARY = e.CanaryJudged(
    provider_id=ALICE.id, model_id=hex32("model"), job_id=JOB, outcome="differed",
    distance_bps=9000, rule=make_rule(
        tolerance_bps=1000, honest_ppm=10_000, cheating_ppm=100_000, false_alarm_ppm=100,
        miss_ppm=10_000,
    ),
)  # fmt: skip
DISPUTE = e.DisputeOpened(
    job_id=JOB, account_id="acct_1", provider_id="prov_1", epoch=1, kind="output_tokens",
    counted_by="bytes", claimed_input_tokens=100, claimed_output_tokens=500,
    claimed_reasoning_tokens=0, own_input_tokens=100, own_output_tokens=50,
    receipt_hash=hex32("receipt"),
)  # fmt: skip
EXAMPLES: tuple[e.EventData, ...] = (
    e.JobRequested(
        job_id=JOB, account_id="acct_1", api_key_id="key_1", gateway_id="gw1", model_id=MODEL,
        req_hash=hex32("request"), envelope_bytes=4096, max_price_nanoton=1000,
        max_input_tokens=100, max_output_tokens=100, not_after_ms=1, policy_hash=POLICY,
        recipient_key_ids=(ALICE.key_id,), stream=True,
    ),
    e.FundsHeld(job_id=JOB, account_id="acct_1", amount_nanoton=1000),
    e.FundsRefused(
        job_id=JOB, account_id="acct_1", needed_nanoton=1000, available_nanoton=999
    ),
    e.ProviderMatched(
        job_id=JOB, provider_id="prov_1", epoch=1, key_id=ALICE.key_id, lease_ttl_ms=10_000,
        quote=QUOTE, quote_id=hex32("quote"), evidence_id=hex32("evidence"),
        signing_key=ALICE.signing_key, attested_position=3,
    ),
    e.LeaseExpired(job_id=JOB, provider_id="prov_1", epoch=1, reason="silent", counts=True),
    e.JobFailed(job_id=JOB, account_id="acct_1", reason="provider_lost", released_nanoton=1000),
    e.JobCancelled(job_id=JOB, account_id="acct_1", released_nanoton=1000),
    e.ResultSealed(
        job_id=JOB, provider_id="prov_1", epoch=1, status="complete", receipt="00" * 420,
        resp_hash=hex32("response"), blob_hash=hex32("blob"), response_bytes=2048,
        input_tokens=100, cached_input_tokens=20, output_tokens=50, reasoning_tokens=5,
    ),
    e.ResultRejected(
        job_id=JOB, provider_id="prov_1", epoch=1, reason="wrong_price",
        receipt_hash=hex32("receipt"),
    ),
    settlement(held=1000, price=285, provider=270, fee=15),
    e.AccountOpened(account_id="acct_1"),
    e.DepositCredited(
        account_id="acct_1", amount_nanoton=5_000_000_000, source="dev", reference="first"
    ),
    e.LedgerSnapshotTaken(shard=1, position=100_000, sha256=hex32("books")),
    *ALICE.network_events()[:3],
    e.AttestationRevoked(provider_id=ALICE.id, evidence_id=ALICE.evidence_id, reason="ban"),
    ALICE.network_events()[3],
    e.PolicyPublished(policy_hash=POLICY, version=1, previous_hash=None),
    e.OpenTierLimitsSet(
        policy_hash=POLICY, limits=OpenTierLimits(max_running_jobs=4, max_job_nanoton=10**9)
    ),
    e.ProviderProfilePublished(
        provider_id=ALICE.id, region="eu-west",
        models=(e.ProfiledModel(model_id=MODEL, quantisation="int8"),),
    ),
    e.MatchingSeedCommitted(shard=1, period=1, commitment=hex32("commitment")),
    e.MatchingSeedRevealed(shard=1, period=1, secret=hex32("secret")),
    CANARY,
    e.HonestyDecided(
        provider_id=ALICE.id, model_id=hex32("model"), verdict="dishonest", judged=4, differed=4
    ),
    e.HonestyLifted(provider_id=ALICE.id),
    DISPUTE,
)  # fmt: skip


def as_item(command_id: str, stream: str, *events: e.EventData) -> AppendItem:
    """Events of one stream as one command that expects nothing."""
    return AppendItem(
        command_id=command_id,
        command=b"{}",
        actor="test",
        correlation_id=stream.partition("/")[2],
        expects=(),
        events=tuple(NewEvent(stream, event) for event in events),
    )


def put(log: ModelLog, stream: str, events: Iterable[e.EventData], command_id: str = "") -> None:
    """Append events to one stream of a model log, as one command."""
    log.append(as_item(command_id or f"put-{len(log.events)}", stream, *events))


def stored(shard: int, stream: str, events: Iterable[e.EventData]) -> list[StoredEvent]:
    log = ModelLog(shard)
    put(log, stream, events)
    return log.events
