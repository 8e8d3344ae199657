"""Billing's decision on a result: seal it and pay exactly what the quote says, or reject it.

The price follows from the receipt's counts and the quote that the match cites; a receipt that
names another price, job, epoch, key or request is refused and unpaid.
"""

from __future__ import annotations

import hashlib

from cocoon.contracts.commands import SettleResult
from cocoon.contracts.events import EventData, PaymentSettled, Quote, ResultRejected, ResultSealed
from cocoon.domain import metering, pricing
from cocoon.domain.job import JobState, JobStatus
from cocoon.kernel.errors import BadRequest, SealingError
from cocoon.sealing.receipt import Receipt, Status, verify_receipt

_STATUS_NAMES = {
    Status.COMPLETE: "complete",
    Status.LENGTH: "length",
    Status.CANCELLED: "cancelled",
    Status.REFUSED: "refused",
    Status.FAILED: "failed",
}
_FREE = frozenset({Status.REFUSED, Status.FAILED})


def decide_settle_result(state: JobState, command: SettleResult) -> tuple[EventData, ...]:
    """ResultSealed and PaymentSettled for a valid receipt of the live epoch, else ResultRejected.

    Raises BadRequest for a job that this provider was never matched to (nothing is written, or
    anybody could grow a stranger's stream). Returns nothing for a repeat of an outcome.
    """
    if (command.epoch, command.provider_id) not in state.matches:
        raise BadRequest("this provider was never matched to this job", code="not_matched")
    if state.result is not None and state.epoch == command.epoch:
        return ()  # settled before: the caller acknowledges again
    if command.epoch in state.rejected_epochs:
        return ()
    reason = _settlement_fault(state, command)
    if reason is not None:
        return (
            ResultRejected(
                job_id=command.job_id,
                provider_id=command.provider_id,
                epoch=command.epoch,
                reason=reason,
                receipt_hash=hashlib.sha256(bytes.fromhex(command.receipt)).hexdigest(),
            ),
        )
    return _settled(state, command)


def _settlement_fault(state: JobState, command: SettleResult) -> str | None:
    """The first reason why this receipt is not paid, or None."""
    request, match = state.request, state.match
    if state.status is not JobStatus.MATCHED or state.epoch != command.epoch:
        return "stale_epoch"
    assert request is not None and match is not None  # noqa: S101, PT018 - MATCHED implies both
    raw = bytes.fromhex(command.receipt)
    try:
        receipt = verify_receipt(raw, bytes.fromhex(match.signing_key))
    except SealingError as error:
        return error.code
    named = (
        ("wrong_job", receipt.job_id.hex(), command.job_id),
        ("wrong_epoch", receipt.epoch, command.epoch),
        ("wrong_key", receipt.key_id.hex(), match.key_id),
        ("wrong_model", receipt.model_id.hex(), request.model_id),
        ("wrong_quote", receipt.quote_id.hex(), match.quote_id),
        ("wrong_request", receipt.req_hash.hex(), request.req_hash),
        ("wrong_evidence", receipt.evidence_id.hex(), match.evidence_id),
    )
    for reason, got, wanted in named:
        if got != wanted:
            return reason
    if receipt.input_tokens > request.max_input_tokens:
        return "too_many_input_tokens"
    if receipt.output_tokens > request.max_output_tokens:
        return "too_many_output_tokens"
    if command.metering and metering.impossible_counts(
        receipt, envelope_bytes=request.envelope_bytes, response_bytes=command.response_bytes
    ):
        return "impossible_counts"
    return _price_fault(receipt, match.quote, state.held_nanoton)


def _price_fault(receipt: Receipt, quote: Quote, held_nanoton: int) -> str | None:
    try:
        owed = 0 if receipt.status in _FREE else pricing.price(quote, counts_of(receipt))
    except ValueError:
        return "bad_counts"
    if receipt.price_nanoton != owed:
        return "wrong_price"
    return "above_hold" if owed > held_nanoton else None


def counts_of(receipt: Receipt) -> pricing.TokenCounts:
    """The receipt's counts. Raises ValueError if the parts exceed the whole."""
    return pricing.TokenCounts(
        input=receipt.input_tokens,
        cached_input=receipt.cached_input_tokens,
        output=receipt.output_tokens,
        reasoning=receipt.reasoning_tokens,
    )


def _settled(state: JobState, command: SettleResult) -> tuple[EventData, ...]:
    request, match = state.request, state.match
    assert request is not None and match is not None  # noqa: S101, PT018 - checked by the caller
    receipt = Receipt.decode(bytes.fromhex(command.receipt))
    parts = pricing.split(receipt.price_nanoton, match.quote.fee_bps)
    sealed = ResultSealed(
        job_id=command.job_id,
        provider_id=command.provider_id,
        epoch=command.epoch,
        status=_STATUS_NAMES[receipt.status],  # type: ignore[arg-type]
        receipt=command.receipt,
        resp_hash=receipt.resp_hash.hex(),
        blob_hash=command.blob_hash,
        response_bytes=command.response_bytes,
        input_tokens=receipt.input_tokens,
        cached_input_tokens=receipt.cached_input_tokens,
        output_tokens=receipt.output_tokens,
        reasoning_tokens=receipt.reasoning_tokens,
    )
    settled = PaymentSettled(
        job_id=command.job_id,
        account_id=request.account_id,
        api_key_id=request.api_key_id,
        provider_id=command.provider_id,
        epoch=command.epoch,
        quote_id=match.quote_id,
        held_nanoton=state.held_nanoton,
        price_nanoton=receipt.price_nanoton,
        provider_nanoton=parts.provider,
        fee_nanoton=parts.fee,
        released_nanoton=state.held_nanoton - receipt.price_nanoton,
    )
    return sealed, settled
