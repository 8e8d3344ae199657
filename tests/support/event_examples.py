"""One example of every event type and version. Run this file to write golden files that are
missing; a file that exists is never rewritten: the bytes have been published."""

from __future__ import annotations

from pathlib import Path

from cocoon.contracts import events as ev
from cocoon.contracts.honesty import HonestyRule
from cocoon.contracts.matching import OpenTierLimits

GOLDEN = Path(__file__).resolve().parents[1] / "contract" / "golden"
_JOB = "0f" * 16
_ACCOUNT, _KEY, _PROVIDER = "acct_0123456789abcdef", "key_0123456789ab", "prov_" + "ab" * 16
_H1, _H2, _H3, _H4, _H5 = ("11" * 32, "22" * 32, "33" * 32, "44" * 32, "55" * 32)
_BIG = 9_223_372_036_854_775_807  # past 2**53: amounts travel as decimal strings
_QUOTE = ev.Quote(
    model_id=_H1,
    input_nanoton_per_mtok=250_000_000,
    cached_input_nanoton_per_mtok=25_000_000,
    output_nanoton_per_mtok=_BIG,
    fee_bps=500,
)

_RULE = HonestyRule(
    tolerance_bps=1000, honest_ppm=10_000, cheating_ppm=100_000, false_alarm_ppm=100,
    miss_ppm=10_000, differ_unats=2_302_585, pass_unats=95_310, dishonest_at_unats=9_200_290,
    honest_at_unats=4_605_070,
)  # fmt: skip

EXAMPLES: tuple[ev.EventData, ...] = (
    ev.JobRequested(
        job_id=_JOB, account_id=_ACCOUNT, api_key_id=_KEY, gateway_id="gw0123456789ab",
        model_id=_H1, req_hash=_H2, envelope_bytes=2048, max_price_nanoton=_BIG,
        max_input_tokens=4096, max_output_tokens=512, not_after_ms=1_790_000_000_000,
        policy_hash=_H3, recipient_key_ids=("01" * 16, "02" * 16), stream=True,
    ),
    ev.FundsHeld(job_id=_JOB, account_id=_ACCOUNT, amount_nanoton=1_000_000),
    ev.FundsRefused(job_id=_JOB, account_id=_ACCOUNT, needed_nanoton=5, available_nanoton=0),
    ev.ProviderMatched(
        job_id=_JOB, provider_id=_PROVIDER, epoch=1, key_id="01" * 16, lease_ttl_ms=10_000,
        quote=_QUOTE, quote_id=_H2, evidence_id=_H3, signing_key=_H4, attested_position=17,
    ),
    ev.LeaseExpired(job_id=_JOB, provider_id=_PROVIDER, epoch=1, reason="silent", counts=True),
    ev.JobFailed(job_id=_JOB, account_id=_ACCOUNT, reason="no_provider", released_nanoton=7),
    ev.JobCancelled(job_id=_JOB, account_id=_ACCOUNT, released_nanoton=7),
    ev.ResultSealed(
        job_id=_JOB, provider_id=_PROVIDER, epoch=1, status="complete", receipt="c0" * 420,
        resp_hash=_H1, blob_hash=_H2, response_bytes=900, input_tokens=10,
        cached_input_tokens=2, output_tokens=30, reasoning_tokens=0,
    ),
    ev.ResultRejected(
        job_id=_JOB, provider_id=_PROVIDER, epoch=2, reason="bad_signature", receipt_hash=_H1
    ),
    ev.PaymentSettled(
        job_id=_JOB, account_id=_ACCOUNT, api_key_id=_KEY, provider_id=_PROVIDER, epoch=1,
        quote_id=_H1, held_nanoton=100, price_nanoton=60, provider_nanoton=57, fee_nanoton=3,
        released_nanoton=40,
    ),
    ev.AccountOpened(account_id=_ACCOUNT),
    ev.DepositCredited(
        account_id=_ACCOUNT, amount_nanoton=_BIG, source="ton", reference="lt:123/hash:ab"
    ),
    ev.ProviderEnrolled(provider_id=_PROVIDER, identity_key=_H1, tier="simulated"),
    ev.OfferPublished(
        provider_id=_PROVIDER,
        models=(
            ev.OfferedModel(
                model_id=_H1, name="skills-1", context_tokens=512,
                input_nanoton_per_mtok=1, cached_input_nanoton_per_mtok=0,
                output_nanoton_per_mtok=2,
            ),
        ),
        concurrency=4,
    ),
    ev.ProviderAttested(
        provider_id=_PROVIDER, evidence_id=_H1, verdict="accepted", assurance="simulated",
        signing_key=_H2, models_root=_H3, valid_until_ms=1_790_000_000_000, collateral_hash=_H4,
        policy_hash=_H5,
    ),
    ev.AttestationRevoked(provider_id=_PROVIDER, evidence_id=_H1, reason="expired"),
    ev.KeyBundlePublished(
        provider_id=_PROVIDER, key_id="01" * 16, evidence_id=_H1,
        not_before_ms=1_790_000_000_000, not_after_ms=1_790_000_600_000, bundle="ca1b" * 8,
    ),
    ev.PolicyPublished(policy_hash=_H1, version=1, previous_hash=None),
    ev.OpenTierLimitsSet(
        policy_hash=_H1, limits=OpenTierLimits(max_running_jobs=4, max_job_nanoton=_BIG)
    ),
    ev.ProviderProfilePublished(
        provider_id=_PROVIDER, region="eu-west",
        models=(ev.ProfiledModel(model_id=_H1, quantisation="int8"),),
    ),
    ev.MatchingSeedCommitted(shard=1, period=7, commitment=_H1),
    ev.MatchingSeedRevealed(shard=1, period=6, secret=_H2),
    ev.LedgerSnapshotTaken(shard=1, position=100_000, sha256=_H1),
    ev.CanaryJudged(
        provider_id=_PROVIDER, model_id=_H1, job_id=_JOB, outcome="differed", distance_bps=8700,
        rule=_RULE,
    ),
    ev.HonestyDecided(
        provider_id=_PROVIDER, model_id=_H1, verdict="dishonest", judged=9, differed=5
    ),
    ev.HonestyLifted(provider_id=_PROVIDER),
    ev.DisputeOpened(
        job_id=_JOB, account_id=_ACCOUNT, provider_id=_PROVIDER, epoch=1, kind="output_tokens",
        counted_by="tokenizer", claimed_input_tokens=64, claimed_output_tokens=512,
        claimed_reasoning_tokens=0, own_input_tokens=20, own_output_tokens=40, receipt_hash=_H1,
    ),
)  # fmt: skip


def golden_file(event: ev.EventData | type[ev.EventData]) -> Path:
    return GOLDEN / f"{event.event_type}.v{event.schema_version}.json"


def write_missing() -> list[Path]:
    missing = [event for event in EXAMPLES if not golden_file(event).exists()]
    for event in missing:
        golden_file(event).write_bytes(event.to_canonical())
    return [golden_file(event) for event in missing]


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in write_missing():
        print(f"wrote {path.name}")
