"""Clients' disputes: a receipt that its provider signed, and what the client counted beside it.

A dispute is written once a job, on a stream of its own, and moves no money.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cocoon.contracts.commands import OpenDispute
from cocoon.contracts.events import DisputeOpened
from cocoon.contracts.messages import DisputeRequest
from cocoon.domain.job import JobState, fold
from cocoon.domain.metering import decide_open_dispute
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.read import stream_events
from cocoon.kernel.errors import Forbidden, NotFound, SealingError
from cocoon.sealing.receipt import Receipt, verify_receipt
from services.billing import decide

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool


class Disputes:
    """One account shard's."""

    def __init__(self, appender: LogAppender, pool: Pool, shard: int) -> None:
        self._appender, self._pool, self._shard = appender, pool, shard

    async def do_open(self, request: DisputeRequest) -> DisputeOpened:
        """The job's dispute, opened now or before.

        Raises NotFound for a job that is not this account's, Forbidden for a receipt that the
        job's provider did not sign, BadRequest where nothing is in dispute.
        """
        stream = f"dispute/{request.job_id}"
        async with acquired(self._pool) as conn:
            job = await stream_events(conn, self._shard, f"job/{request.job_id}")
            known = await stream_events(conn, self._shard, stream)
        if known:
            return _opened(known[0].decode())
        state = fold(stored.decode() for stored in job)
        if state.request is None or state.request.account_id != request.account_id:
            raise NotFound("there is no such job of this account", code="job_not_found")
        command = _command(request, state)
        item = decide.dispute_item(command, decide_open_dispute(command))
        outcome = await self._appender.append(item)
        if isinstance(outcome, Appended):
            return _opened(outcome.events[0].decode())
        async with acquired(self._pool) as conn:  # another one was first
            return _opened((await stream_events(conn, self._shard, stream))[0].decode())


def _command(request: DisputeRequest, state: JobState) -> OpenDispute:
    raw = bytes.fromhex(request.dispute.receipt)
    receipt = _signed(raw, request.job_id, state)
    assert state.match is not None  # noqa: S101 - _signed found its signer
    return OpenDispute(
        job_id=request.job_id,
        account_id=request.account_id,
        provider_id=state.match.provider_id,
        epoch=state.match.epoch,
        kind=request.dispute.kind,
        counted_by=request.dispute.counted_by,
        claimed_input_tokens=receipt.input_tokens,
        claimed_output_tokens=receipt.output_tokens,
        claimed_reasoning_tokens=min(receipt.reasoning_tokens, receipt.output_tokens),
        own_input_tokens=request.dispute.own_input_tokens,
        own_output_tokens=request.dispute.own_output_tokens,
        receipt_hash=hashlib.sha256(raw).hexdigest(),
    )


def _signed(raw: bytes, job_id: str, state: JobState) -> Receipt:
    """The receipt, if the job's last match signed it for this job and epoch."""
    match = state.match
    try:
        if match is not None:
            receipt = verify_receipt(raw, bytes.fromhex(match.signing_key))
            if (receipt.job_id.hex(), receipt.epoch) == (job_id, match.epoch):
                return receipt
    except SealingError:
        pass
    raise Forbidden(
        "the receipt is not one that this job's provider signed; send the one that came with the "
        "answer",
        code="wrong_receipt",
    )


def _opened(event: object) -> DisputeOpened:
    assert isinstance(event, DisputeOpened)  # noqa: S101 - nothing else is on such a stream
    return event
