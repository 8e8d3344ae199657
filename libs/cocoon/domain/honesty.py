"""A sequential test of each provider and model over its canaries, and what it decides.

Wald's test of two shares: an honest provider's canaries seldom differ, a cheating one's often. The
score is an integer, so that the log replays. docs/honesty.md publishes the rule and what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from cocoon.contracts.commands import JudgeCanary, LiftHonesty
from cocoon.contracts.events import CanaryJudged, EventData, HonestyDecided, HonestyLifted
from cocoon.contracts.honesty import HonestyRule
from cocoon.kernel.errors import BadRequest

MILLION: Final = 1_000_000
MAX_MODELS: Final = 256  # that one provider is tested for at a time
LEAST_CALIBRATION: Final = 20
_MARGIN_BPS: Final = 100
_WHOLE_BPS: Final = 10_000


def make_rule(
    *, tolerance_bps: int, honest_ppm: int, cheating_ppm: int, false_alarm_ppm: int, miss_ppm: int
) -> HonestyRule:
    """The test that tells the two shares apart. Raises BadRequest for shares that it cannot."""
    if not 0 < honest_ppm < cheating_ppm < MILLION:
        raise BadRequest(
            "the share of canaries that differ must be above 0 and greater for a cheat than for an "
            "honest provider"
        )
    if not (0 < false_alarm_ppm < MILLION // 2 and 0 < miss_ppm < MILLION // 2):
        raise BadRequest("false alarms and misses are shares between 0 and a half")
    honest, cheating = honest_ppm / MILLION, cheating_ppm / MILLION
    alarm, miss = false_alarm_ppm / MILLION, miss_ppm / MILLION
    return HonestyRule(
        tolerance_bps=tolerance_bps,
        honest_ppm=honest_ppm,
        cheating_ppm=cheating_ppm,
        false_alarm_ppm=false_alarm_ppm,
        miss_ppm=miss_ppm,
        differ_unats=_unats(cheating / honest),
        pass_unats=_unats((1 - honest) / (1 - cheating)),
        dishonest_at_unats=_unats((1 - miss) / alarm),
        honest_at_unats=_unats((1 - alarm) / miss),
    )


def _unats(ratio: float) -> int:
    return max(1, round(math.log(ratio) * MILLION))


def calibrate(distances_bps: Sequence[int]) -> tuple[int, int]:
    """(tolerance in basis points, honest share in ppm) from honest engines against each other.

    The tolerance is what nine of ten kept, and a percent; the share is an upper bound of those
    beyond it: three more than were seen. Raises BadRequest for fewer than 20 distances.
    """
    if len(distances_bps) < LEAST_CALIBRATION:
        raise BadRequest(f"calibration takes at least {LEAST_CALIBRATION} pairs of answers")
    ordered = sorted(distances_bps)
    tolerance = min(_WHOLE_BPS, ordered[(len(ordered) * 9 - 1) // 10] + _MARGIN_BPS)
    beyond = sum(1 for distance in ordered if distance > tolerance)
    return tolerance, min(MILLION - 1, (beyond + 3) * MILLION // (len(ordered) + 3))


# ---- the test ----


@dataclass(frozen=True, slots=True)
class Test:
    """One model's running test under one rule."""

    __test__ = False  # no test of pytest's

    rule: HonestyRule
    judged: int = 0  # passed or differed
    differed: int = 0
    unclear: int = 0
    score_unats: int = 0


@dataclass(frozen=True, slots=True)
class HonestyState:
    """One provider's: running tests by model, and the models that it was found to cheat with."""

    tests: tuple[tuple[str, Test], ...] = ()
    dishonest: tuple[str, ...] = ()
    version: int = 0

    def test(self, model_id: str) -> Test | None:
        return dict(self.tests).get(model_id)


def after(test: Test | None, event: CanaryJudged) -> Test:
    """The test with one more canary. Another rule begins another test."""
    if test is None or (test.rule is not event.rule and test.rule != event.rule):
        test = Test(event.rule)
    if event.outcome == "unclear":
        return replace(test, unclear=test.unclear + 1)
    differs = event.outcome == "differed"
    step = event.rule.differ_unats if differs else -event.rule.pass_unats
    return replace(
        test, judged=test.judged + 1, differed=test.differed + differs,
        score_unats=test.score_unats + step,
    )  # fmt: skip


def verdict(test: Test) -> str:
    """dishonest, honest, or open while neither is sure."""
    if test.score_unats >= test.rule.dishonest_at_unats:
        return "dishonest"
    if test.score_unats <= -test.rule.honest_at_unats:
        return "honest"
    return "open"


def evolve(state: HonestyState, event: EventData) -> HonestyState:
    """Fold one event of a provider's honesty stream. Unknown ones only raise the version."""
    state = replace(state, version=state.version + 1)
    match event:
        case CanaryJudged():
            test = after(state.test(event.model_id), event)
            return replace(state, tests=(*_others(state, event.model_id), (event.model_id, test)))
        case HonestyDecided():
            found = event.model_id if event.verdict == "dishonest" else None
            dishonest = state.dishonest if found is None else (*state.dishonest, found)
            return replace(state, tests=_others(state, event.model_id), dishonest=dishonest)
        case HonestyLifted():
            return replace(state, tests=(), dishonest=())
        case _:
            return state


def _others(state: HonestyState, model_id: str) -> tuple[tuple[str, Test], ...]:
    kept = tuple(pair for pair in state.tests if pair[0] != model_id)
    return kept[-(MAX_MODELS - 1) :]


def decide_judge_canary(state: HonestyState, command: JudgeCanary) -> tuple[EventData, ...]:
    """CanaryJudged, and HonestyDecided once the test is sure.

    Once it was found to cheat with a model, nothing more is written of it until it is lifted.
    """
    if command.model_id in state.dishonest:
        return ()
    judged = CanaryJudged(**command.model_dump())
    test = after(state.test(command.model_id), judged)
    found = verdict(test)
    if found == "open":
        return (judged,)
    decided = HonestyDecided(
        provider_id=command.provider_id,
        model_id=command.model_id,
        verdict="dishonest" if found == "dishonest" else "honest",
        judged=test.judged,
        differed=test.differed,
    )
    return judged, decided


def decide_lift_honesty(state: HonestyState, command: LiftHonesty) -> tuple[EventData, ...]:
    """Forget verdicts and running tests; nothing where there are none."""
    if not state.tests and not state.dishonest:
        return ()
    return (HonestyLifted(provider_id=command.provider_id),)
