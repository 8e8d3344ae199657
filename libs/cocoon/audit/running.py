"""A round of canaries: draw, ask as a client does, ask the reference, judge, report; one at a time.

What the market chooses is counted; now and then a provider is put first, as clients' `order` does:
its envelope has as many recipients as any other, so the provider sees no difference.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cocoon.audit.asking import Answered, Body, Reference
from cocoon.audit.prompts import Prompts, below
from cocoon.domain.comparing import Judgement, judge, text_distance_bps
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import CocoonError

HOUR_S: Final = 3600.0
MOST_WAIT_S: Final = 24 * HOUR_S
ITSELF: Final = "reference_itself"  # the market chose the trusted one
_SHARE: Final = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """How canaries are sent. Shares are basis points; per_hour None: one after the other."""

    model: str
    count: int
    tolerance_bps: int
    max_tokens: int = 128
    per_hour: float | None = None
    stream_bps: int = 5000
    order_bps: int = 2500
    targets: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Canary:
    """One that was judged, without content."""

    answered: Answered
    judgement: Judgement


class Report(Protocol):
    """Where judgements go; returns what the network made of it."""

    async def __call__(self, canary: Canary) -> dict[str, Any]: ...


@dataclass(slots=True)
class Round:
    """What a round found."""

    canaries: list[Canary] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)  # error codes
    verdicts: dict[str, str] = field(default_factory=dict)  # provider id -> its last verdict

    @property
    def cost_nanoton(self) -> int:
        return sum(one.answered.cost_nanoton for one in self.canaries)

    def told(self) -> dict[str, Any]:
        by: dict[str, Counter[str]] = {}
        for one in self.canaries:
            found = by.setdefault(one.answered.provider_id, Counter())
            found[one.judgement.outcome] += 1
        return {
            "canaries": len(self.canaries),
            "cost_nanoton": str(self.cost_nanoton),
            "failed": dict(self.failed),
            "providers": {
                provider: {**counts, "verdict": self.verdicts.get(provider, "open")}
                for provider, counts in sorted(by.items())
            },
        }


async def run(
    plan: Plan, prompts: Prompts, ask: Callable[[Body], Awaitable[Answered]],
    reference: Reference, report: Report, randomness: Randomness,
) -> Round:  # fmt: skip
    """Send `plan.count` canaries. A job or a reference that fails is counted, and judges nobody."""
    found = Round()
    for _ in range(plan.count):
        if plan.per_hour is not None:
            await asyncio.sleep(gap_s(plan.per_hour, randomness))
        body = request(plan, prompts, randomness, found)
        try:
            answered = await ask(body)
            if answered.provider_id == reference.provider_id:
                found.failed[ITSELF] += 1  # it says nothing of anybody
                continue
            plain = {name: value for name, value in body.items() if name != "provider"}
            told, model_id = await reference.ask({**plain, "stream": False})
        except CocoonError as error:
            found.failed[error.code] += 1
            continue
        judgement = judge(told, answered.told, plan.tolerance_bps)
        if model_id is not None and model_id != answered.model_id:
            judgement = Judgement("unclear", judgement.distance_bps, "other_model")
        canary = Canary(answered, judgement)
        found.canaries.append(canary)
        try:
            said = await report(canary)
        except CocoonError as error:
            found.failed[error.code] += 1
            continue
        found.verdicts[answered.provider_id] = str(said.get("verdict", "open"))
    return found


def request(plan: Plan, prompts: Prompts, randomness: Randomness, found: Round) -> Body:
    """One canary's body: greedy, streamed or whole, as clients send it."""
    body: Body = {
        "model": plan.model,
        "messages": prompts.draw(),
        "temperature": 0,
        "max_tokens": plan.max_tokens,
    }
    if below(randomness, _SHARE) < plan.stream_bps:
        body["stream"] = True
    if plan.targets and below(randomness, _SHARE) < plan.order_bps:
        seen = Counter(one.answered.provider_id for one in found.canaries)
        fewest = min(seen[target] for target in plan.targets)
        least = [target for target in plan.targets if seen[target] == fewest]
        body["provider"] = {"order": [least[below(randomness, len(least))]]}
    return body


def gap_s(per_hour: float, randomness: Randomness) -> float:
    """Seconds to the next one: exponential, so that no canary tells when another comes."""
    drawn = (int.from_bytes(randomness.token(7), "big") + 1) / (2**56 + 1)
    return min(MOST_WAIT_S, -math.log(drawn) * HOUR_S / per_hour)


async def distances(
    plan: Plan, prompts: Prompts, first: Reference, second: Reference, randomness: Randomness
) -> list[int]:
    """How far two trusted engines' answers are apart, for calibration."""
    apart = []
    for _ in range(plan.count):
        body = request(plan, prompts, randomness, Round())
        body.pop("provider", None)
        body.pop("stream", None)
        one, _ = await first.ask(body)
        other, _ = await second.ask(body)
        apart.append(text_distance_bps(one.text, other.text))
    return apart
