"""Which models run, from what is configured, known and the time. Pure: models.py does it.

A model is wanted while the file names and enables it. One that is no longer wanted takes the jobs
that were matched before the network heard of it, for a bounded time; then its engine ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_FAILED_CHECKS: Final = 2
MAX_FAILED_JOBS: Final = 3


@dataclass(frozen=True, slots=True)
class Health:
    """What checks and jobs said of an engine, one after the other.

    Failed jobs alone take nothing away, for a request may be at fault: they make the engine
    suspect, and a suspect one must give a token to pass a check.
    """

    failed_checks: int = 0
    failed_jobs: int = 0

    @property
    def away(self) -> bool:
        return self.failed_checks >= MAX_FAILED_CHECKS

    @property
    def suspect(self) -> bool:
        return self.failed_jobs >= MAX_FAILED_JOBS

    def checked(self, *, passed: bool) -> Health:
        if passed:
            return Health()
        failed = MAX_FAILED_CHECKS if self.suspect else self.failed_checks + 1
        return Health(min(failed, MAX_FAILED_CHECKS), self.failed_jobs)

    def not_started(self) -> Health:
        return Health(MAX_FAILED_CHECKS, self.failed_jobs)

    def answered(self, *, well: bool) -> Health:
        failed = 0 if well else min(self.failed_jobs + 1, MAX_FAILED_JOBS)
        return Health(self.failed_checks, failed)


@dataclass(frozen=True, slots=True)
class Facts:
    """One model now. Times are monotonic seconds."""

    wanted: bool
    told_s: float | None  # since when the network knows that it is not offered any more
    warm: bool
    unload_after_s: float | None
    up: bool
    jobs: int  # accepted and not ended
    idle_since_s: float
    health: Health = Health()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be so. `start` and `stop` are of its engine; forgetting ends it for good."""

    takes: bool
    start: bool = False
    stop: bool = False
    forget: bool = False


def plan(facts: Facts, now_s: float, *, grace_s: float) -> Plan:
    """Never stops an engine with jobs, never takes a job for one that is away."""
    over = not facts.wanted and facts.told_s is not None and now_s >= facts.told_s + grace_s
    idle = facts.jobs == 0
    unused = (
        not facts.warm
        and facts.unload_after_s is not None
        and now_s >= facts.idle_since_s + facts.unload_after_s
    )
    return Plan(
        takes=not over and not facts.health.away,
        start=facts.wanted and facts.warm and not facts.up,
        stop=facts.up and idle and not over and unused,
        forget=over and idle,
    )
