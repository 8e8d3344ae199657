"""What a charge and a match rest on, looked at afresh and not by the deciders (invariants 6, 7)."""

from __future__ import annotations

from collections.abc import Sequence

from cocoon.contracts import events as e
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.domain import pricing
from cocoon.kernel.errors import CocoonError
from cocoon.sealing.receipt import Receipt, Status, verify_receipt
from tests.support.collected import Evidence

FREE = (Status.REFUSED, Status.FAILED)
REVOCATION_LAG_US = 5_000_000  # how long a matcher may need to hear of a revocation


def receipt_fault(
    sealed: e.ResultSealed, match: e.ProviderMatched, charge: e.PaymentSettled
) -> str | None:
    """Why the receipt does not cover the charge, or None. Looked at afresh, not by the decider."""
    try:
        receipt = verify_receipt(bytes.fromhex(sealed.receipt), bytes.fromhex(match.signing_key))
        owed = 0 if receipt.status in FREE else pricing.price(match.quote, _counts(receipt))
    except (CocoonError, ValueError):
        return "a wrong signature or form"
    if (receipt.job_id.hex(), receipt.epoch) != (match.job_id, match.epoch):
        return "another job or epoch"
    if (receipt.key_id.hex(), receipt.evidence_id.hex()) != (match.key_id, match.evidence_id):
        return "another key or evidence"
    if receipt.quote_id.hex() != pricing.quote_id(match.quote):
        return "another quote"
    if not receipt.price_nanoton == owed == charge.price_nanoton:
        return f"the price {receipt.price_nanoton} for {owed}, charged {charge.price_nanoton}"
    return None


def _counts(receipt: Receipt) -> pricing.TokenCounts:
    return pricing.TokenCounts(
        receipt.input_tokens, receipt.cached_input_tokens,
        receipt.output_tokens, receipt.reasoning_tokens,
    )  # fmt: skip


def match_of(
    rows: Sequence[tuple[StoredEvent, e.EventData]], epoch: int
) -> e.ProviderMatched | None:
    found = [d for _, d in rows if isinstance(d, e.ProviderMatched) and d.epoch == epoch]
    return found[0] if found else None


def attestation_fault(
    evidence: Evidence, matched: StoredEvent, match: e.ProviderMatched
) -> str | None:
    if NETWORK_SHARD not in evidence.logs:
        return None
    network = evidence.whole_log(NETWORK_SHARD)
    if not 1 <= match.attested_position <= len(network):
        return f"the match cites position {match.attested_position}, which is not in the log"
    attested = network[match.attested_position - 1].decode()
    if not isinstance(attested, e.ProviderAttested) or (
        attested.provider_id, attested.evidence_id, attested.signing_key,
    ) != (match.provider_id, match.evidence_id, match.signing_key):  # fmt: skip
        return "the match cites another attestation than its provider's"
    for row, event in evidence.whole_decoded(NETWORK_SHARD)[match.attested_position :]:
        if (
            isinstance(event, e.AttestationRevoked)
            and event.evidence_id == match.evidence_id
            and row.recorded_at_us + REVOCATION_LAG_US < matched.recorded_at_us
        ):
            return f"the match came after the revocation at position {row.position}"
    return None
