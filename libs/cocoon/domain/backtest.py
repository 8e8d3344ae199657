"""What another matching policy would have done with the jobs of a log. Pure; it changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cocoon.contracts.commands import Candidate, RequestJob
from cocoon.contracts.matching import MatchingPolicy
from cocoon.domain import matching
from cocoon.domain.leasing import need_of, requested_of
from cocoon.domain.pricing import greatest_price


@dataclass
class Outcome:
    """One policy's choices: who got how many jobs, what they could cost, how long they wait."""

    jobs: Counter[str] = field(default_factory=Counter)  # by provider
    unmatched: int = 0
    nanoton: int = 0  # the most that the jobs can cost, together
    wait_us: int = 0  # (running + 1) / places x average first token, together

    def add(self, command: RequestJob, chosen: Candidate | matching.NoCandidate) -> None:
        if not isinstance(chosen, Candidate):
            self.unmatched += 1
            return
        self.jobs[chosen.provider_id] += 1
        self.nanoton += greatest_price(
            chosen.quote, command.max_input_tokens, command.max_output_tokens
        )
        self.wait_us += matching.expected_wait_us(chosen)


@dataclass
class Backtest:
    """First matches of a log under the policies that decided them, and under another.

    What follows a lost match depends on who had it, so only first ones are taken. The snapshots
    are what the log holds: had the other policy ruled, loads and histories would have become
    others (the market of benchmarks/matching.py shows that).
    """

    policy: MatchingPolicy
    then: Outcome = field(default_factory=Outcome)
    other: Outcome = field(default_factory=Outcome)
    decisions: int = 0
    moved: int = 0  # jobs that another provider would have had

    def take(self, command: RequestJob) -> None:
        """Decide it twice, on its own snapshot and seed."""
        if command.available_nanoton < command.max_price_nanoton:
            return  # nobody was sought
        need = need_of(
            requested_of(command), command.now_ms, asked=command.preferences,
            affinity=command.affinity, open_limits=command.open_limits,
        )  # fmt: skip
        then = matching.choose(command.candidates, need, command.seed, command.policy)
        other = matching.choose(command.candidates, need, command.seed, self.policy)
        self.decisions += 1
        self.moved += _name(then) != _name(other)
        self.then.add(command, then)
        self.other.add(command, other)


def _name(chosen: Candidate | matching.NoCandidate) -> str:
    return chosen.provider_id if isinstance(chosen, Candidate) else ""
