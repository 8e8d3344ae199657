"""The matcher's decisions: hold and match, or refuse; end a lease, and what follows it."""

from __future__ import annotations

import pytest

from cocoon.contracts.events import (
    EventData,
    FundsHeld,
    FundsRefused,
    JobCancelled,
    JobFailed,
    JobRequested,
    LeaseExpired,
    ProviderMatched,
)  # fmt: skip
from cocoon.domain.job import JobState, JobStatus, fold
from cocoon.domain.leasing import (
    MAX_EPOCHS,
    decide_expire_lease,
    decide_request_job,
)  # fmt: skip
from cocoon.domain.pricing import quote_id
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import CocoonError, Conflict, DeadlineExceeded, RateLimited, Unavailable
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    LEASE_TTL_MS,
    NOT_AFTER_MS,
    NOW_MS,
    PROVIDERS,
    Provider,
    expire_command,
    matched_job,
    request_command,
    settle_command,
)  # fmt: skip
from tests.support.sentences import says_why


def types(events: tuple[EventData, ...]) -> list[str]:
    return [event.event_type for event in events]


def test_a_job_is_requested_held_and_matched_in_one_decision() -> None:
    command = request_command(providers=(ALICE,))
    events = decide_request_job(JobState(), command)
    assert types(events) == ["JobRequested", "FundsHeld", "ProviderMatched"]
    requested, held, match = events
    assert isinstance(requested, JobRequested)
    assert isinstance(held, FundsHeld)
    assert isinstance(match, ProviderMatched)
    asked = requested.model_dump()
    assert asked == {name: command.model_dump()[name] for name in asked}
    assert held.amount_nanoton == command.max_price_nanoton
    assert (match.epoch, match.lease_ttl_ms) == (1, LEASE_TTL_MS)
    assert (match.provider_id, match.key_id) == (ALICE.id, ALICE.key_id)
    assert match.quote_id == quote_id(match.quote)
    assert (match.evidence_id, match.signing_key) == (ALICE.evidence_id, ALICE.signing_key)


@pytest.mark.parametrize(("available", "granted"), [(10_000, True), (9_999, False), (0, False)])
def test_the_whole_hold_must_be_there(available: int, granted: bool) -> None:
    events = decide_request_job(JobState(), request_command(available_nanoton=available))
    assert isinstance(events[-1], ProviderMatched if granted else FundsRefused)
    if not granted:
        assert types(events) == ["JobRequested", "FundsRefused"]


ALL_BUSY = {"candidates": tuple(p.candidate(running=2) for p in PROVIDERS)}


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"not_after_ms": NOW_MS}, DeadlineExceeded, "expired"),
        ({"not_after_ms": NOW_MS - 1}, DeadlineExceeded, "expired"),
        ({"candidates": ()}, Unavailable, "no_provider_recipient"),
        ({"max_price_nanoton": 1}, Unavailable, "no_provider_price"),
        ({"candidates": (ALICE.candidate(alive=False),)}, Unavailable, "no_provider_alive"),
        (ALL_BUSY, RateLimited, "providers_busy"),
    ],
)
def test_what_cannot_be_accepted_writes_nothing_and_says_why(
    changes: dict[str, object], error: type[CocoonError], code: str
) -> None:
    with pytest.raises(error, check=says_why) as refused:
        decide_request_job(JobState(), request_command(**changes))  # type: ignore[arg-type]
    assert refused.value.code == code
    assert refused.value.retry_after_s == (1 if error is RateLimited else None)


def test_a_job_id_is_used_once_for_ever() -> None:
    ended = fold([JobFailed(job_id="0" * 32, account_id="a", reason="r", released_nanoton=0)])
    for state in (matched_job(), ended):
        with pytest.raises(Conflict, match="draw a new one", check=says_why) as refused:
            decide_request_job(state, request_command())
        assert refused.value.code == "job_id_used"


def test_only_the_live_epoch_can_end() -> None:
    state = matched_job()
    assert decide_expire_lease(state, expire_command(epoch=2)) == ()
    assert decide_expire_lease(JobState(), expire_command()) == ()
    ended = fold(decide_expire_lease(state, expire_command(may_rematch=False)), state)
    assert decide_expire_lease(ended, expire_command()) == ()


def test_a_lost_provider_is_replaced_by_another_candidate_with_the_next_epoch() -> None:
    state = matched_job()
    assert state.match is not None
    expired, match = decide_expire_lease(state, expire_command(reason="silent"))
    assert isinstance(expired, LeaseExpired)
    assert isinstance(match, ProviderMatched)
    assert (expired.provider_id, expired.epoch) == (state.match.provider_id, 1)
    assert (expired.reason, expired.counts) == ("silent", True)
    assert match.epoch == 2
    assert match.provider_id != state.match.provider_id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"may_rematch": False, "failure": "bad_request"}, "bad_request"),
        ({"candidates": ()}, "provider_lost"),
        ({"candidates": (), "failure": "providers_busy", "reason": "busy"}, "providers_busy"),
        ({"now_ms": NOT_AFTER_MS}, "deadline_exceeded"),
    ],
)
def test_when_nobody_may_take_over_the_job_fails_and_the_hold_is_released(
    changes: dict[str, object], reason: str
) -> None:
    state = matched_job()
    _, failed = decide_expire_lease(state, expire_command(**changes))
    assert isinstance(failed, JobFailed)
    assert (failed.reason, failed.released_nanoton) == (reason, 10_000)
    assert fold([failed], state).status is JobStatus.FAILED


def test_a_cancelled_job_is_not_matched_again() -> None:
    _, cancelled = decide_expire_lease(matched_job(), expire_command(cancelled=True))
    assert isinstance(cancelled, JobCancelled)
    assert cancelled.released_nanoton == 10_000


def crowd(size: int) -> tuple[Provider, ...]:
    return tuple(Provider(f"crowd {index}") for index in range(size))


def run_out(reason: str, providers: tuple[Provider, ...]) -> tuple[JobState, list[EventData]]:
    """Match and end again until the job fails."""
    candidates = tuple(p.candidate() for p in providers)
    log = list(decide_request_job(JobState(), request_command(providers=providers)))
    state = fold(log)
    while state.status is JobStatus.MATCHED:
        events = decide_expire_lease(
            state, expire_command(epoch=state.epoch, reason=reason, candidates=candidates)
        )
        log.extend(events)
        state = fold(events, state)
    return state, log


def test_after_three_epochs_that_count_the_job_fails() -> None:
    state, log = run_out("silent", crowd(6))
    assert (state.status, state.counted_epochs, state.epoch) == (JobStatus.FAILED, 3, 3)
    assert isinstance(log[-1], JobFailed)
    assert log[-1].reason == "attempts_exhausted"


def test_a_busy_provider_costs_no_attempt_but_the_number_of_epochs_is_bounded() -> None:
    state, log = run_out("busy", crowd(MAX_EPOCHS + 4))
    assert (state.counted_epochs, state.epoch) == (0, MAX_EPOCHS)
    assert isinstance(log[-1], JobFailed)
    providers = [provider for _, provider in state.matches]
    assert len(set(providers)) == len(providers)


def test_who_was_busy_may_be_chosen_again_and_who_failed_the_job_may_not() -> None:
    state = matched_job(providers=(ALICE, BOB))
    assert state.match is not None
    first, other = (ALICE, BOB) if state.match.provider_id == ALICE.id else (BOB, ALICE)
    alone = {"reason": "busy", "again": True, "candidates": (first.candidate(),)}

    state = fold(decide_expire_lease(state, expire_command(**alone)), state)
    assert (state.epoch, state.status, state.failed_at) == (2, JobStatus.MATCHED, ())
    assert state.match is not None
    assert state.match.provider_id == first.id

    lost = expire_command(epoch=2, reason="gone", candidates=(other.candidate(),))
    state = fold(decide_expire_lease(state, lost), state)
    assert (state.epoch, state.failed_at) == (3, (first.id,))
    _, failed = decide_expire_lease(state, expire_command(epoch=3, **alone))
    assert isinstance(failed, JobFailed)


def test_while_all_are_busy_that_may_take_the_job_its_lease_does_not_end() -> None:
    state = matched_job(providers=(ALICE,))
    full = (ALICE.candidate(running=2, concurrency=2),)
    assert decide_expire_lease(state, expire_command(candidates=full, again=True)) == ()
    _, failed = decide_expire_lease(state, expire_command(candidates=full))
    assert isinstance(failed, JobFailed)


def test_a_result_that_came_first_leaves_nothing_to_expire() -> None:
    state = matched_job()
    settled = fold(decide_settle_result(state, settle_command(state)), state)
    assert settled.status is JobStatus.SETTLED
    assert decide_expire_lease(settled, expire_command()) == ()


def test_the_same_command_on_the_same_state_decides_the_same() -> None:
    state = matched_job(providers=(ALICE, BOB, CAROL))
    once, twice = (decide_expire_lease(state, expire_command()) for _ in range(2))
    assert once == twice
