"""A job as the log tells it, for its owner only: status, stored response, what a repeat needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cocoon.contracts.events import JobFailed
from cocoon.domain.job import JobState, JobStatus, evolve
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.explaining import explanations
from cocoon.eventlog.read import stream_events
from cocoon.kernel.errors import CocoonError, Conflict, InsufficientFunds, NotFound, Unavailable
from services.gateway.actions import LogView, Match
from services.gateway.refusals import idempotency_mismatch

if TYPE_CHECKING:
    from cocoon.contracts.events import EventData, ProviderMatched
    from cocoon.eventlog.connection import Pool

POOL_WAIT_S = 2.0


class JobRecord(NamedTuple):
    """A job's folded events; times in Unix milliseconds, 0 = not yet."""

    job_id: str
    state: JobState
    requested_ms: int
    changed_ms: int
    failure: str


async def read_job(pool: Pool, shard: int, job_id: str) -> JobRecord | None:
    """Fold the job's stream, None if it has no event. Raises Unavailable or LogCorrupt."""
    async with acquired(pool, POOL_WAIT_S) as connection:
        events = await stream_events(connection, shard, f"job/{job_id}")
    if not events:
        return None
    state, failure = JobState(), ""
    for stored in events:
        event = stored.decode()
        state = evolve(state, event)
        if isinstance(event, JobFailed):
            failure = event.reason
    return JobRecord(
        job_id, state, events[0].recorded_at_us // 1000, events[-1].recorded_at_us // 1000, failure
    )


async def read_owned_job(pool: Pool, shard: int, job_id: str, account_id: str) -> JobRecord:
    """Like `read_job`; a stranger's job does not exist. Raises NotFound."""
    record = await read_job(pool, shard, job_id)
    request = record.state.request if record else None
    if record is None or request is None or request.account_id != account_id:
        raise NotFound("there is no such job of this account", code="job_not_found")
    return record


async def read_dispute(pool: Pool, shard: int, job_id: str) -> dict[str, Any] | None:
    """The job's dispute as the log tells it, None without one."""
    async with acquired(pool, POOL_WAIT_S) as connection:
        events = await stream_events(connection, shard, f"dispute/{job_id}")
    if not events:
        return None
    return told_dispute(events[0].decode())


def told_dispute(event: EventData) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude={"job_id", "account_id"})


async def read_explanations(pool: Pool, shard: int, job_id: str) -> list[dict[str, Any]]:
    """Why the job went where it went, a decision each."""
    async with acquired(pool, POOL_WAIT_S) as connection:
        return [found.told() for found in await explanations(connection, shard, job_id)]


def match_of(matched: ProviderMatched) -> Match:
    return Match(
        epoch=matched.epoch,
        provider_id=matched.provider_id,
        quote_json=matched.quote.to_canonical().decode(),
        quote_id=matched.quote_id,
        evidence_id=matched.evidence_id,
    )


def view(record: JobRecord | None, account_id: str, req_hash: str, gateway_id: str) -> LogView:
    """What the log says to a job's machine. Another's job, or another request, ends it."""
    if record is None or record.state.request is None:
        return LogView(None, absent=True)
    state, request = record.state, record.state.request
    if request.account_id != account_id or request.req_hash != req_hash:
        return LogView(None, ended=idempotency_mismatch())
    ended = end_error(record)
    if ended is not None:
        return LogView(None, ended=ended)
    here = request.gateway_id == gateway_id
    if state.match is None or state.status is JobStatus.UNMATCHED:
        return LogView(None, here=here)
    if state.status is JobStatus.SETTLED and state.result is not None:
        blob_hash = bytes.fromhex(state.result.blob_hash)
        size = state.result.response_bytes
        return LogView(match_of(state.match), None, blob_hash, size, here=here)
    return LogView(match_of(state.match), here=here)


def end_error(record: JobRecord) -> CocoonError | None:
    """The error of a job that ended without a response, else None."""
    match record.state.status:
        case JobStatus.REFUSED:
            return InsufficientFunds("the account's funds did not cover this job; add some")
        case JobStatus.CANCELLED:
            return Conflict("this job was cancelled; nothing was charged", code="job_cancelled")
        case JobStatus.FAILED:
            return Unavailable(
                f"this job failed ({record.failure}); nothing was charged, send it again with a "
                "new Idempotency-Key",
                code="job_failed",
            )
        case _:
            return None


def stored_response(record: JobRecord) -> tuple[Match, str, int]:
    """Who stored the job's response in SEALED, its digest and size.

    Raises Conflict while it runs, and the job's own error if it ended without one.
    """
    ended = end_error(record)
    if ended is not None:
        raise ended
    result, matched = record.state.result, record.state.match
    if result is None or matched is None:
        raise Conflict(
            "the job still runs; ask again when it is settled", code="job_running", retry_after_s=1
        )
    return match_of(matched), result.blob_hash, result.response_bytes


def describe(record: JobRecord) -> dict[str, Any]:
    """The job for its owner: ids, digests, counts, times in ms; amounts as decimal strings."""
    state, request = record.state, record.state.request
    assert request is not None  # noqa: S101 - an owned job has a request
    told: dict[str, Any] = {
        "id": record.job_id,
        "object": "cocoon.job",
        "status": state.status.value,
        "epoch": state.epoch,
        "model_id": request.model_id,
        "req_hash": request.req_hash,
        "max_price_nanoton": str(request.max_price_nanoton),
        "held_nanoton": str(state.held_nanoton),
        "price_nanoton": str(state.price_nanoton) if state.status is JobStatus.SETTLED else None,
        "requested_ms": record.requested_ms,
        "changed_ms": record.changed_ms,
        "failure": record.failure or None,
    }
    if state.match is not None:
        told["provider_id"] = state.match.provider_id
        told["quote_id"] = state.match.quote_id
        told["quote"] = state.match.quote.model_dump(mode="json")
        told["evidence_id"] = state.match.evidence_id
    if state.result is not None:
        told["result"] = state.result.model_dump(mode="json", exclude={"job_id", "provider_id"})
    return told
