"""The matcher's pure part: from what it knows to commands, log items and messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cocoon.contracts.commands import Candidate, Command, ExpireLease, RequestJob
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import EventData, JobFailed, ProviderMatched
from cocoon.contracts.matching import BALANCED, MatchingPolicy, OpenTierLimits
from cocoon.contracts.messages import DispatchReport, ErrorBody, JobRequest, MatchUpdate
from cocoon.domain.job import JobState
from cocoon.kernel.errors import CocoonError
from cocoon.kernel.ids import named_command_id

ACTOR = "matcher"
Reason = Literal["expired", "silent", "busy", "refused", "rejected", "revoked", "gone"]


def request_command(
    request: JobRequest,
    available_nanoton: int,
    candidates: Sequence[Candidate],
    lease_ttl_ms: int,
    seed: str,
    now_ms: int,
    policy: MatchingPolicy = BALANCED,
    *,
    seed_period: int = 0,
    open_limits: OpenTierLimits | None = None,
) -> RequestJob:
    """The command with everything that its decision may look at."""
    fields = dict(vars(request))  # frozen parts stay as they are: they were checked once
    del fields["command_id"]
    return RequestJob(
        **fields,
        available_nanoton=available_nanoton,
        candidates=tuple(candidates),
        lease_ttl_ms=lease_ttl_ms,
        seed=seed,
        now_ms=now_ms,
        policy=policy,
        seed_period=seed_period,
        open_limits=open_limits,
    )


def request_item(
    request: JobRequest,
    command: RequestJob,
    events: Sequence[EventData],
    account_version: int,
    traceparent: str,
) -> AppendItem:
    """Holds depend on the account's stream: a withdrawal falsifies them, a settlement does not."""
    expects = ((f"job/{request.job_id}", 0), (f"account/{request.account_id}", account_version))
    return _item(request.command_id, command, request.job_id, expects, events, traceparent)


def expire_item(
    command: ExpireLease, state: JobState, events: Sequence[EventData], traceparent: str
) -> AppendItem:
    command_id = named_command_id("expire", command.job_id, str(command.epoch))
    expects = ((f"job/{command.job_id}", state.version),)
    return _item(command_id, command, command.job_id, expects, events, traceparent)


def _item(
    command_id: str,
    command: Command,
    job_id: str,
    expects: tuple[tuple[str, int], ...],
    events: Sequence[EventData],
    traceparent: str,
) -> AppendItem:
    return AppendItem(
        command_id=command_id,
        command=command.to_stored(),
        actor=ACTOR,
        correlation_id=job_id,
        expects=expects,
        events=tuple(NewEvent(f"job/{job_id}", event) for event in events),
        traceparent=traceparent,
    )


def matched_update(match: ProviderMatched) -> MatchUpdate:
    return MatchUpdate(
        kind="matched",
        job_id=match.job_id,
        epoch=match.epoch,
        provider_id=match.provider_id,
        key_id=match.key_id,
        quote=match.quote,
        quote_id=match.quote_id,
        evidence_id=match.evidence_id,
        lease_ttl_ms=match.lease_ttl_ms,
    )


def committed_update(match: ProviderMatched, position: int) -> MatchUpdate:
    return MatchUpdate(
        kind="committed",
        job_id=match.job_id,
        epoch=match.epoch,
        provider_id=match.provider_id,
        position=position,
    )


def refused_update(job_id: str, error: CocoonError) -> MatchUpdate:
    return MatchUpdate(
        kind="refused",
        job_id=job_id,
        error=ErrorBody(
            status=error.http_status,
            code=error.code,
            message=error.message[:1000],
            retry_after_s=error.retry_after_s,
        ),
    )


_FAILURES = {
    "providers_busy": (429, "all providers that this request is sealed to are busy; try again"),
    "unknown_key": (409, "the provider has rotated its key; fetch the directory and seal again"),
    "wrong_policy": (409, "the policy has changed; fetch the directory and seal again"),
    "expired": (409, "the sealed request has expired; seal it again"),
    "bad_request": (400, "the provider could not open the sealed request; seal it again"),
    "deadline_exceeded": (504, "no provider answered before the request's deadline"),
    "attempts_exhausted": (503, "three providers in turn failed this job; try again"),
}
_PROVIDER_LOST = (
    503,
    "the provider of this job failed and no other could take it; send the request again",
)


def failure_error(reason: str) -> ErrorBody:
    """What the client is told when a job fails for `reason`."""
    status, message = _FAILURES.get(reason, _PROVIDER_LOST)
    code = "reseal" if status == 409 else reason
    retry_after_s = 1 if status in (429, 503) else None
    return ErrorBody(status=status, code=code, message=message, retry_after_s=retry_after_s)


def ended_update(job_id: str, event: EventData) -> MatchUpdate:
    """The gateway's news of a job that failed or was cancelled."""
    if isinstance(event, JobFailed):
        error = failure_error(event.reason)
    else:
        error = ErrorBody(status=409, code="job_cancelled", message="the job was cancelled")
    return MatchUpdate(kind="ended", job_id=job_id, error=error)


def refusal(report: DispatchReport) -> tuple[Reason, bool, str]:
    """(reason, may match again, failure if nobody is left) for a dispatch that was not taken.

    Not for one that was told `busy`: it waits for room.
    """
    if report.outcome == "silent":
        return "silent", True, "provider_silent"
    # Another recipient may still know its key; a malformed envelope is malformed everywhere.
    return "refused", report.code != "bad_request", report.code
