"""What one provider is told of the jobs that it did not get: which, why, and by how much.

Each decision is made again from its stored command. Nothing here names a client, or who got the
job; what it tells of prices, the directory tells everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from cocoon.contracts.commands import Candidate, ExpireLease, RequestJob
from cocoon.contracts.events import Quote
from cocoon.domain.explaining import Sought, sentence, sought, standings
from cocoon.domain.job import JobState
from cocoon.domain.matching import Standing
from cocoon.domain.pricing import greatest_price

Decision: TypeAlias = tuple[JobState, RequestJob | ExpireLease]  # the job's state before it
NOT_SEALED: Final = "not_sealed"
MAX_BPS: Final = 1_000_000  # a hundred times as much: what lies beyond says no more
_NEARER: Final = {"lost": 0, "not_drawn": 1, "passed_by": 2, "filtered": 3}


@dataclass(frozen=True, slots=True)
class Lost:
    """One job that went elsewhere, or to nobody.

    `reason`: what decided it (price, speed, success, draw, order, exploration, sort:...), with its
    step before it where that was not the last: filtered:capacity, passed_by:slow, not_drawn; or
    not_sealed. `margin_bps`: of a lost term, of the client's limit, or of the winner's price; None
    where there is nothing to measure.
    """

    job_id: str
    at_ms: int
    model_id: str
    reason: str
    margin_bps: int | None
    sentence: str


def lost_by(
    provider_id: str, decisions: Iterable[Decision], models: Collection[str] = ()
) -> list[Lost]:
    """What this provider lost of these decisions, in their order.

    `models`: the ids that it offers; a job of one of them that was sealed to others is lost too.
    """
    found = (_lost(provider_id, state, command, models) for state, command in decisions)
    return [one for one in found if one is not None]


def _lost(
    provider_id: str, state: JobState, command: RequestJob | ExpireLease, models: Collection[str]
) -> Lost | None:
    seeking = sought(state, command)
    if seeking is None:
        return None
    own = [c for c in command.candidates if c.provider_id == provider_id]
    model_id = seeking.request.model_id
    if not own:
        if model_id not in models:
            return None
        told = "the client sealed this job to others, or did not find this provider then"
        return Lost(command.job_id, command.now_ms, model_id, NOT_SEALED, None, told)
    all_told = standings(seeking, command)
    mine = [one for one in all_told if one.provider_id == provider_id]
    if not mine or any(one.outcome == "won" for one in mine):
        return None
    nearest = min(mine, key=lambda one: _NEARER[one.outcome])
    winner = next((one.provider_id for one in all_told if one.outcome == "won"), None)
    won = next((c for c in command.candidates if c.provider_id == winner), None)
    margin = _margin_bps(nearest, own[0], won, seeking, command)
    return Lost(
        command.job_id, command.now_ms, model_id, _reason(nearest), margin, _told(nearest, margin)
    )


def _reason(standing: Standing) -> str:
    if standing.outcome == "lost":
        return standing.by
    return "not_drawn" if standing.outcome == "not_drawn" else f"{standing.outcome}:{standing.by}"


def _told(standing: Standing, margin_bps: int | None) -> str:
    told = sentence(standing)
    if margin_bps is None or standing.margin_permille:  # then the sentence has it
        return told
    return f"{told}; over by {margin_bps / 100:g} %"


def _margin_bps(
    standing: Standing, own: Candidate, won: Candidate | None, seeking: Sought,
    command: RequestJob | ExpireLease,
) -> int | None:  # fmt: skip
    request = seeking.request
    tokens = request.max_input_tokens, request.max_output_tokens
    match standing.outcome, standing.by:
        case "lost", ("speed" | "price" | "success"):
            return standing.margin_permille * 10
        case "lost", "sort:price" if won is not None:
            return _over(greatest_price(own.quote, *tokens), greatest_price(won.quote, *tokens))
        case "filtered", "price":
            return _over(greatest_price(own.quote, *tokens), request.max_price_nanoton)
        case "filtered", "token_price":
            return _over_limits(own.quote, command)
        case _:
            return None


def _over_limits(quote: Quote, command: RequestJob | ExpireLease) -> int | None:
    """Over the client's limits per token: by the greater excess of the two."""
    asked = command.preferences
    if asked is None:
        return None
    pairs = (
        (quote.input_nanoton_per_mtok, asked.max_input_nanoton_per_mtok),
        (quote.output_nanoton_per_mtok, asked.max_output_nanoton_per_mtok),
    )
    return max((_over(own, most) for own, most in pairs if most is not None), default=None)


def _over(own: int, most: int) -> int:
    return min(MAX_BPS, max(0, own - most) * 10_000 // max(1, most))
