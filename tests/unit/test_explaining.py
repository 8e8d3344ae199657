"""Nobody is told that he won where nobody was sought."""

from __future__ import annotations

import pytest

from cocoon.contracts.events import FundsRefused, JobCancelled, JobFailed, ProviderMatched
from cocoon.contracts.matching import BALANCED
from cocoon.domain.backtest import Backtest
from cocoon.domain.explaining import explain_decision, sentence
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.domain.matching import Standing
from cocoon.domain.reputation import Reputation, observe
from tests.support.job_world import (
    NOT_AFTER_MS,
    PROVIDERS,
    expire_command,
    matched_job,
    request_command,
)
from tests.support.sentences import is_sentence


def test_a_match_is_explained_with_every_candidate() -> None:
    command = request_command(policy=BALANCED)
    matched = decide_request_job(JobState(), command)[-1]
    told = explain_decision(JobState(), command)
    assert isinstance(matched, ProviderMatched)
    assert told is not None
    assert {one.provider_id for one in told.standings} == {p.id for p in PROVIDERS}
    assert [o.provider_id for o in told.standings if o.outcome == "won"] == [matched.provider_id]
    assert (told.policy, told.policy_hash) == (BALANCED.name, BALANCED.hash)


def test_refused_funds_sought_nobody() -> None:
    command = request_command(available_nanoton=1, policy=BALANCED)
    assert isinstance(decide_request_job(JobState(), command)[-1], FundsRefused)
    assert explain_decision(JobState(), command) is None
    tested = Backtest(BALANCED)
    tested.take(command)
    assert tested.decisions == 0


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"may_rematch": False}, JobFailed),
        ({"now_ms": NOT_AFTER_MS}, JobFailed),
        ({"cancelled": True}, JobCancelled),
    ],
)
def test_a_lease_that_ends_its_job_sought_nobody(changes: dict[str, object], end: type) -> None:
    state, command = matched_job(), expire_command(policy=BALANCED, **changes)
    assert isinstance(decide_expire_lease(state, command)[-1], end)
    assert explain_decision(state, command) is None


def test_who_had_the_job_before_is_told_so_at_the_next_match() -> None:
    state, command = matched_job(), expire_command(policy=BALANCED)
    told = explain_decision(state, command)
    assert state.match is not None
    assert told is not None
    before = next(s for s in told.standings if s.provider_id == state.match.provider_id)
    assert (before.outcome, before.by, told.epoch) == ("filtered", "tried", 2)


def test_what_a_client_cancelled_says_nothing_of_its_provider() -> None:
    command = expire_command(cancelled=True, may_rematch=False, policy=BALANCED)
    found = Reputation()
    for event in decide_expire_lease(matched_job(), command):
        found = observe(found, event)
    assert found == Reputation()


def test_what_a_client_sealed_wrongly_costs_its_provider_nothing() -> None:
    found = Reputation()
    for event in decide_expire_lease(matched_job(), expire_command(reason="refused")):
        found = observe(found, event)
    assert found == Reputation()


def test_a_provider_that_fell_silent_is_remembered_for_it() -> None:
    found = Reputation()
    for event in decide_expire_lease(matched_job(), expire_command(reason="silent")):
        found = observe(found, event)
    assert (found.ended_jobs, found.success_ppm) == (1, 950_000)


@pytest.mark.parametrize("outcome", ["won", "lost", "filtered", "passed_by", "not_drawn"])
@pytest.mark.parametrize("by", ["price", "speed", "slow", "order", "exploration", "only one left"])
def test_every_standing_has_a_sentence(outcome: str, by: str) -> None:
    assert is_sentence(sentence(Standing("prov_a", outcome, by, 40)))
