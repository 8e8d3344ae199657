"""How soon canaries find a cheat, and how often they accuse an honest provider: by simulation.

    python -m benchmarks.honesty [--seed N] [--repeats N]

A function of the seed. The test is the product's (cocoon.domain.honesty, comparing.judge); what is
modelled is the provider: which of its jobs it answers by another model, how often such an answer is
beyond the tolerance, how often an honest one is, and which jobs are canaries.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report import percentile
from cocoon.contracts.events import CanaryJudged
from cocoon.contracts.honesty import HonestyRule
from cocoon.domain import honesty
from cocoon.domain.comparing import Told, judge

RULE = honesty.make_rule(
    tolerance_bps=1000, honest_ppm=10_000, cheating_ppm=100_000, false_alarm_ppm=100,
    miss_ppm=10_000,
)  # fmt: skip
HONEST_DIFFERS = 0.005  # half of what the rule allows an honest provider
MOST_CANARIES = 20_000
LENGTHS = (16, 256)  # tokens of an answer


@dataclass(frozen=True)
class Found:
    """One kind of cheat; jobs are the provider's own, median and 95 %, by share of canaries."""

    share_found: float
    median_canaries: float
    jobs: tuple[tuple[float, float], ...]


def canaries_until(
    differs: Callable[[random.Random], bool], draw: random.Random, rule: HonestyRule,
    most: int = MOST_CANARIES,
) -> int | None:  # fmt: skip
    """Canaries until the verdict dishonest, None if it did not come; honest verdicts begin anew."""
    event = {differing: _judged(rule, differing) for differing in (True, False)}
    test: honesty.Test | None = None
    for count in range(1, most + 1):
        test = honesty.after(test, event[differs(draw)])
        match honesty.verdict(test):
            case "dishonest":
                return count
            case "honest":
                test = None
    return None


def _judged(rule: HonestyRule, differs: bool) -> CanaryJudged:
    return CanaryJudged(
        provider_id="prov_x", model_id="11" * 32, job_id="0f" * 16,
        outcome="differed" if differs else "passed", distance_bps=0, rule=rule,
    )  # fmt: skip


def swapping(swapped: float, beyond: float) -> Callable[[random.Random], bool]:
    """Answers a share of its jobs by another model, whose answers are so often beyond."""

    def differs(draw: random.Random) -> bool:
        likely = beyond if draw.random() < swapped else HONEST_DIFFERS
        return draw.random() < likely

    return differs


def inflating(surplus: float) -> Callable[[random.Random], bool]:
    """Answers rightly and claims so many more output tokens."""

    beyond = {
        tokens: judge(
            Told("same", tokens), Told("same", tokens + int(tokens * surplus)), RULE.tolerance_bps
        ).outcome == "differed"
        for tokens in range(LENGTHS[0], LENGTHS[1] + 1)
    }  # fmt: skip

    def differs(draw: random.Random) -> bool:
        return beyond[draw.randint(*LENGTHS)]

    return differs


def detection(
    differs: Callable[[random.Random], bool], shares: Sequence[float], repeats: int, seed: int
) -> Found:
    draw = random.Random(seed)  # noqa: S311
    needed = [canaries_until(differs, draw, RULE) for _ in range(repeats)]
    found = [count for count in needed if count is not None]
    if not found:
        return Found(0.0, math.inf, ())
    jobs = [[float(_jobs(count, share, draw)) for count in found] for share in shares]
    return Found(
        len(found) / repeats,
        percentile([float(count) for count in found], 50),
        tuple((percentile(row, 50), percentile(row, 95)) for row in jobs),
    )


def _jobs(canaries: int, share: float, draw: random.Random) -> int:
    """The provider's jobs until so many of them were canaries, each with this chance."""
    log = math.log1p(-share)
    return sum(int(math.log(1 - draw.random()) / log) + 1 for _ in range(canaries))


def false_alarms(
    differ_share: float, within: Sequence[int], repeats: int, seed: int
) -> list[float]:
    """The shares of honest providers that are accused within so many canaries."""
    draw = random.Random(seed)  # noqa: S311

    def differs(random_: random.Random) -> bool:
        return random_.random() < differ_share

    accused = [canaries_until(differs, draw, RULE, max(within)) for _ in range(repeats)]
    return [
        sum(1 for one in accused if one is not None and one <= most) / repeats for most in within
    ]


CHEATS: tuple[tuple[str, Callable[[random.Random], bool]], ...] = (
    ("another model, all jobs", swapping(1.0, 0.95)),
    ("another model, half of the jobs", swapping(0.5, 0.95)),
    ("another model, a fifth", swapping(0.2, 0.95)),
    ("another model, a tenth", swapping(0.1, 0.95)),
    ("another model, a twentieth", swapping(0.05, 0.95)),
    ("another model, a fiftieth", swapping(0.02, 0.95)),
    ("coarser quantisation, all jobs", swapping(1.0, 0.3)),
    ("coarser quantisation, half", swapping(0.5, 0.3)),
    ("coarser quantisation, a fifth", swapping(0.2, 0.3)),
    ("10 % more tokens claimed", inflating(0.10)),
    ("15 % more", inflating(0.15)),
    ("20 % more", inflating(0.20)),
    ("50 % more", inflating(0.50)),
)
SHARES = (0.01, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    print("| the provider | canaries until found, median | jobs until found, 1 % canaries: median, "
          "95 % | jobs, 0.1 % canaries: median, 95 % | found within 20,000 canaries |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    for name, differs in CHEATS:
        found = detection(differs, SHARES, options.repeats, options.seed)
        if not found.jobs:
            print(f"| {name} | never | | | 0 % |")
            continue
        jobs = " | ".join(f"{median:,.0f}, {late:,.0f}" for median, late in found.jobs)
        print(
            f"| {name} | {found.median_canaries:,.0f} | {jobs} | {100 * found.share_found:.0f} % |"
        )
    print("\n| honest; its canaries differ in | accused within 1,000 canaries | within 10,000 |")
    print("| --- | --- | --- |")
    for share in (0.001, 0.005, 0.01, 0.02):
        soon, late = false_alarms(share, (1000, 10_000), options.repeats, options.seed)
        print(f"| {100 * share:.1f} % | {100 * soon:.1f} % | {100 * late:.1f} % |")


if __name__ == "__main__":
    main()
