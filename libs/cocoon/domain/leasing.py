"""The matcher's decisions: hold and match a new job; end a lease and match again, fail or cancel.

A decider raises Rejected or Transient when nothing may be written, and returns events otherwise.
"""

from __future__ import annotations

from cocoon.contracts.commands import Candidate, ExpireLease, RequestJob
from cocoon.contracts.events import (
    EventData,
    FundsHeld,
    FundsRefused,
    JobCancelled,
    JobFailed,
    JobRequested,
    LeaseExpired,
    ProviderMatched,
)
from cocoon.contracts.matching import OpenTierLimits, Preferences
from cocoon.domain import matching, pricing
from cocoon.domain.job import JobState, JobStatus
from cocoon.kernel.errors import Conflict, DeadlineExceeded, RateLimited, Unavailable

MAX_COUNTED_EPOCHS = 3  # attempts of a job at providers that accepted it or vanished
MAX_EPOCHS = 16  # with the refusals of busy providers, which do not count


def _matched(job_id: str, epoch: int, lease_ttl_ms: int, chosen: Candidate) -> ProviderMatched:
    return ProviderMatched(
        job_id=job_id,
        provider_id=chosen.provider_id,
        epoch=epoch,
        key_id=chosen.key_id,
        lease_ttl_ms=lease_ttl_ms,
        quote=chosen.quote,
        quote_id=pricing.quote_id(chosen.quote),
        evidence_id=chosen.evidence_id,
        signing_key=chosen.signing_key,
        attested_position=chosen.attested_position,
    )


def decide_request_job(state: JobState, command: RequestJob) -> tuple[EventData, ...]:
    """Hold and match in one decision, or refuse the funds.

    Raises Conflict for a job id already used, DeadlineExceeded past not_after, RateLimited when
    all candidates are busy and Unavailable (naming the filter) when nobody can take the job:
    in these cases nothing is written, because nothing was accepted.
    """
    if state.status is not JobStatus.ABSENT:
        raise Conflict("this job id was used before; draw a new one", code="job_id_used")
    if command.not_after_ms <= command.now_ms:
        raise DeadlineExceeded("the request's not_after has passed; seal it again", code="expired")
    requested = requested_of(command)
    if command.available_nanoton < command.max_price_nanoton:
        return (
            requested,
            FundsRefused(
                job_id=command.job_id,
                account_id=command.account_id,
                needed_nanoton=command.max_price_nanoton,
                available_nanoton=command.available_nanoton,
            ),
        )
    need = need_of(
        requested, command.now_ms, asked=command.preferences, affinity=command.affinity,
        open_limits=command.open_limits,
    )  # fmt: skip
    chosen = matching.choose(command.candidates, need, command.seed, command.policy)
    if isinstance(chosen, matching.NoCandidate):
        if chosen.is_capacity:
            raise RateLimited(chosen.message, code="providers_busy", retry_after_s=1)
        raise Unavailable(chosen.message, code=f"no_provider_{chosen.emptied_by}")
    return (
        requested,
        FundsHeld(
            job_id=command.job_id,
            account_id=command.account_id,
            amount_nanoton=command.max_price_nanoton,
        ),
        _matched(command.job_id, 1, command.lease_ttl_ms, chosen),
    )


def requested_of(command: RequestJob) -> JobRequested:
    """The event that says what was asked."""
    return JobRequested(
        job_id=command.job_id,
        account_id=command.account_id,
        api_key_id=command.api_key_id,
        gateway_id=command.gateway_id,
        model_id=command.model_id,
        req_hash=command.req_hash,
        envelope_bytes=command.envelope_bytes,
        max_price_nanoton=command.max_price_nanoton,
        max_input_tokens=command.max_input_tokens,
        max_output_tokens=command.max_output_tokens,
        not_after_ms=command.not_after_ms,
        policy_hash=command.policy_hash,
        recipient_key_ids=command.recipient_key_ids,
        stream=command.stream,
    )


def need_of(
    request: JobRequested, now_ms: int, excluded: frozenset[str] = frozenset(), *,
    asked: Preferences | None = None, affinity: str = "",
    open_limits: OpenTierLimits | None = None,
) -> matching.Need:  # fmt: skip
    return matching.Need(
        model_id=request.model_id,
        recipient_key_ids=request.recipient_key_ids,
        max_price_nanoton=request.max_price_nanoton,
        max_input_tokens=request.max_input_tokens,
        max_output_tokens=request.max_output_tokens,
        now_ms=now_ms,
        excluded_providers=excluded,
        preferences=asked or matching.NOTHING_ASKED,
        affinity=affinity,
        open_limits=open_limits,
    )


def decide_expire_lease(state: JobState, command: ExpireLease) -> tuple[EventData, ...]:
    """End the live lease and decide what follows: another match, a failure, or a cancellation.

    Returns nothing if the epoch is no longer live: somebody was first. With `again`, neither while
    all are busy that may still take the job.
    """
    if state.status is not JobStatus.MATCHED or state.epoch != command.epoch:
        return ()
    request, live = state.request, state.match
    assert request is not None and live is not None  # noqa: S101, PT018 - MATCHED implies both
    counts = command.reason != "busy"
    if command.cancelled and command.policy is not None:  # commands of before had it count
        counts = False  # its client has gone: that says nothing of the provider
    expired = LeaseExpired(
        job_id=command.job_id,
        provider_id=live.provider_id,
        epoch=live.epoch,
        reason=command.reason,
        counts=counts,
    )
    if command.cancelled:
        return (
            expired,
            JobCancelled(
                job_id=command.job_id,
                account_id=request.account_id,
                released_nanoton=state.held_nanoton,
            ),
        )
    failure = failure_of(state, command, counts)
    if failure is None:
        excluded = frozenset(state.failed_at if command.again else (*state.tried, live.provider_id))
        need = need_of(
            request, command.now_ms, excluded, asked=command.preferences,
            affinity=command.affinity, open_limits=command.open_limits,
        )  # fmt: skip
        chosen = matching.choose(command.candidates, need, command.seed, command.policy)
        if isinstance(chosen, Candidate):
            return (
                expired,
                _matched(command.job_id, live.epoch + 1, command.lease_ttl_ms, chosen),
            )
        if command.again and chosen.is_capacity:
            return ()
        failure = command.failure
    return (
        expired,
        JobFailed(
            job_id=command.job_id,
            account_id=request.account_id,
            reason=failure,
            released_nanoton=state.held_nanoton,
        ),
    )


def failure_of(state: JobState, command: ExpireLease, counts: bool) -> str | None:
    """Why no further match may be tried, or None."""
    request = state.request
    assert request is not None  # noqa: S101 - the caller checked the status
    if not command.may_rematch:
        return command.failure
    if state.counted_epochs + counts >= MAX_COUNTED_EPOCHS or state.epoch >= MAX_EPOCHS:
        return "attempts_exhausted"
    if command.now_ms >= request.not_after_ms:
        return "deadline_exceeded"
    return None
