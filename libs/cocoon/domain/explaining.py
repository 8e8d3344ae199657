"""Why a job went where it went: its decisions made again from their stored commands, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cocoon.contracts.commands import ExpireLease, RequestJob
from cocoon.contracts.events import JobRequested
from cocoon.domain import matching
from cocoon.domain.job import JobState
from cocoon.domain.leasing import failure_of, need_of, requested_of
from cocoon.domain.matching import Standing


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision that looked for a provider. `policy`: its name, and its hash in hex.

    `tiers`: of the candidates, as they were then; none from before there were tiers.
    """

    epoch: int  # of the match that it made, or would have made
    decided_ms: int
    policy: str
    policy_hash: str
    seed: str
    standings: tuple[Standing, ...]
    tiers: Mapping[str, str]

    def told(self) -> dict[str, Any]:
        """As JSON tells it."""
        return {
            "epoch": self.epoch,
            "decided_ms": self.decided_ms,
            "policy": self.policy,
            "policy_hash": self.policy_hash or None,
            "seed": self.seed,
            "providers": [
                {
                    "provider_id": standing.provider_id,
                    "tier": self.tiers.get(standing.provider_id),
                    "outcome": standing.outcome,
                    "by": standing.by,
                    "margin_permille": standing.margin_permille,
                    "told": sentence(standing),
                }
                for standing in self.standings
            ],
        }


@dataclass(frozen=True, slots=True)
class Sought:
    """What one decision looked for: the request, who had it before, the epoch it would give."""

    request: JobRequested
    excluded: frozenset[str]
    epoch: int


def sought(state: JobState, command: RequestJob | ExpireLease) -> Sought | None:
    """None if the decision looked for nobody. `state` is the job's before the command."""
    if isinstance(command, RequestJob):
        if command.available_nanoton < command.max_price_nanoton:
            return None  # the funds were refused
        return Sought(requested_of(command), frozenset(), 1)
    if state.request is None or state.match is None or command.cancelled:
        return None
    if failure_of(state, command, command.reason != "busy") is not None:
        return None
    live = state.match.provider_id
    tried = state.failed_at if command.again else (*state.tried, live)
    return Sought(state.request, frozenset(tried), state.epoch + 1)


def standings(found: Sought, command: RequestJob | ExpireLease) -> tuple[Standing, ...]:
    """How each candidate fared, by provider: the very decision, made again."""
    need = need_of(
        found.request, command.now_ms, found.excluded, asked=command.preferences,
        affinity=command.affinity, open_limits=command.open_limits,
    )  # fmt: skip
    return matching.explain(command.candidates, need, command.seed, command.policy)


def explain_decision(state: JobState, command: RequestJob | ExpireLease) -> Explanation | None:
    """How each candidate fared. `state` is the job's before the command; None: nobody was sought.

    It is a function of what the log holds, so client, provider and auditor get the same.
    """
    found = sought(state, command)
    if found is None:
        return None
    policy = command.policy
    return Explanation(
        epoch=found.epoch,
        decided_ms=command.now_ms,
        policy=policy.name if policy else "two-choices",
        policy_hash=policy.hash if policy else "",
        seed=command.seed,
        standings=standings(found, command),
        tiers={one.provider_id: one.tier for one in command.candidates if one.tier is not None},
    )


_LOST_BY = {
    "speed": "its wait for a first token",
    "price": "price",
    "success": "the part of its jobs that end well",
    "draw": "the draw: both were equally good",
    "order": "the client's order",
    "exploration": "a turn for a provider without a history",
    "sort:price": "price, by which the client sorts",
    "sort:latency": "its wait for a first token, by which the client sorts",
    "sort:throughput": "tokens a second, by which the client sorts",
}
_FILTERED_BY = {
    "recipient": "the request was not sealed to its current key",
    "model": "it does not offer this model",
    "attestation": "its evidence, or its key, had run out",
    "alive": "its heartbeats were missing, or it drains",
    "only": "the client names others only",
    "ignore": "the client ignores it",
    "tier": "its tier is not one that the client asks for",
    "quantisation": "its quantisation is not one that the client asks for",
    "open_limits": "it has no TEE, and the network's policy allows such a provider no job of this "
    "price",
    "region": "its region is not one that the client asks for",
    "token_price": "its price per token is over what the client allows",
    "context": "the request does not fit its context",
    "price": "the job could cost more with it than the client allows",
    "tried": "it had this job before",
    "capacity": "all its places were taken",
    "order": "the client names others, and allows nobody else",
}


def sentence(standing: Standing) -> str:
    """What a provider, or its client, is told: one sentence without a full stop."""
    by = standing.by
    if standing.outcome == "won":
        return "it got the job" + ("" if by == "only one left" else f", by {_LOST_BY.get(by, by)}")
    if standing.outcome == "filtered":
        return f"it could not get the job: {_FILTERED_BY.get(by, by)}"
    if standing.outcome == "passed_by":
        slow = "its first token takes far longer than the middle one's"
        return f"it was passed by: {slow if by == 'slow' else 'others keep this conversation warm'}"
    if standing.outcome == "not_drawn":
        return "it was not one of the two that were drawn"
    margin = f" by {standing.margin_permille / 10:g} %" if standing.margin_permille else ""
    return f"it lost{margin} on {_LOST_BY.get(by, by)}"
