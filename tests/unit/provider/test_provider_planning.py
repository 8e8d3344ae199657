"""Which models run: the rules hold for every history of checks, jobs, wishes and times."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.provider.planning import (
    MAX_FAILED_CHECKS,
    MAX_FAILED_JOBS,
    Facts,
    Health,
    plan,
)

GRACE_S = 120
_times = st.integers(0, 10_000)
_healths = st.builds(Health, st.integers(0, MAX_FAILED_CHECKS), st.integers(0, MAX_FAILED_JOBS))
_facts = st.builds(
    Facts,
    wanted=st.booleans(), told_s=st.none() | _times, warm=st.booleans(),
    unload_after_s=st.none() | st.integers(10, 1000), up=st.booleans(), jobs=st.integers(0, 3),
    idle_since_s=_times, health=_healths,
)  # fmt: skip


@given(_facts, _times)
def test_no_engine_ends_under_a_job_and_none_that_is_away_is_sent_one(
    facts: Facts, now_s: int
) -> None:
    due = plan(facts, now_s, grace_s=GRACE_S)
    if facts.jobs:
        assert not due.stop
        assert not due.forget
    if facts.health.away:
        assert not due.takes
    assert not (due.start and (due.stop or due.forget))
    if facts.wanted:
        assert not due.forget
    if due.start:
        assert facts.warm
        assert not facts.up


@given(_facts, _times)
def test_what_the_network_may_still_match_is_taken(facts: Facts, now_s: int) -> None:
    well = replace(facts, health=Health())
    untold = replace(well, told_s=None)
    assert plan(untold, now_s, grace_s=GRACE_S).takes
    assert plan(replace(well, wanted=True), now_s, grace_s=GRACE_S).takes
    gone = replace(well, wanted=False, told_s=now_s - GRACE_S)
    assert not plan(gone, now_s, grace_s=GRACE_S).takes
    assert plan(replace(gone, jobs=0), now_s, grace_s=GRACE_S).forget
    assert plan(replace(gone, told_s=now_s - GRACE_S + 1), now_s, grace_s=GRACE_S).takes


@given(_facts, _times)
def test_only_an_idle_engine_that_need_not_be_warm_is_unloaded(facts: Facts, now_s: int) -> None:
    due = plan(facts, now_s, grace_s=GRACE_S)
    if due.stop:
        assert facts.up
        assert not facts.warm
        assert facts.unload_after_s is not None
        assert now_s >= facts.idle_since_s + facts.unload_after_s


class Life(RuleBasedStateMachine):
    """An engine's checks and jobs against what a person would say of it."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health()
        self.failed_in_a_row = 0
        self.checks_failed_in_a_row = 0
        self.away = False

    @rule(passed=st.booleans())
    def check(self, passed: bool) -> None:
        suspect = self.failed_in_a_row >= MAX_FAILED_JOBS
        self.health = self.health.checked(passed=passed)
        if passed:
            self.failed_in_a_row = self.checks_failed_in_a_row = 0
            self.away = False
        else:
            self.checks_failed_in_a_row += 1
            self.away = self.away or suspect or self.checks_failed_in_a_row >= MAX_FAILED_CHECKS

    @rule(well=st.booleans())
    def job(self, well: bool) -> None:
        self.health = self.health.answered(well=well)
        self.failed_in_a_row = 0 if well else self.failed_in_a_row + 1

    @rule()
    def does_not_start(self) -> None:
        self.health = self.health.not_started()
        self.checks_failed_in_a_row = MAX_FAILED_CHECKS
        self.away = True

    @invariant()
    def is_as_a_person_says(self) -> None:
        assert self.health.away == self.away
        assert self.health.suspect == (self.failed_in_a_row >= MAX_FAILED_JOBS)


TestLife = Life.TestCase
