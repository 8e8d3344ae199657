"""What a provider's past jobs say of it: measured from the log, integers, the same for everybody.

docs/matching.md publishes the formula. Nothing here is asked of the provider.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cocoon.contracts.events import EventData, LeaseExpired, ResultSealed
from cocoon.kernel.errors import SealingError
from cocoon.sealing.receipt import Receipt

EARLY_JOBS = 8  # until then a sample weighs a half, then a tenth
EARLY_PART, LATE_PART = 2, 10
SUCCESS_PART = 20
SURE = 1_000_000  # parts per million
_ANSWERED = frozenset({"complete", "length"})
# not "refused": what a client seals wrongly costs it nothing, and must cost nobody else
_ITS_FAULT = frozenset({"expired", "silent", "rejected", "gone"})


@dataclass(frozen=True, slots=True)
class Reputation:
    """One provider's. `success_ppm`: moving average of the jobs that ended well."""

    ended_jobs: int = 0
    success_ppm: int = SURE
    tokens_per_s: int = 0  # of one answer, after its first token; 0 until there is one
    measured_answers: int = 0


def observe(before: Reputation, event: EventData) -> Reputation:
    """Fold one event of a job's stream. What the client cancelled or asked wrongly says nothing."""
    match event:
        case LeaseExpired() if event.counts and event.reason in _ITS_FAULT:
            return _ended(before, 0)
        case ResultSealed() if event.status == "failed":
            return _ended(before, 0)
        case ResultSealed() if event.status in _ANSWERED:
            return _spoke(_ended(before, SURE), event)
        case _:
            return before


def moved(average: int, sample: int, samples: int) -> int:
    """A moving average after one more sample, `samples` of them before it."""
    if samples == 0:
        return sample
    return average + (sample - average) // (EARLY_PART if samples < EARLY_JOBS else LATE_PART)


def _ended(before: Reputation, success_ppm: int) -> Reputation:
    step = (success_ppm - before.success_ppm) // SUCCESS_PART
    return replace(
        before, ended_jobs=before.ended_jobs + 1, success_ppm=max(0, before.success_ppm + step)
    )


def _spoke(before: Reputation, event: ResultSealed) -> Reputation:
    """An answer of several tokens that took a measurable time tells how fast its provider is."""
    try:
        receipt = Receipt.decode(bytes.fromhex(event.receipt))
    except SealingError:
        return before
    took_ms = receipt.last_ms - receipt.first_ms
    if took_ms <= 0 or event.output_tokens < 2:
        return before
    sample = min((event.output_tokens - 1) * 1000 // took_ms, 2**32 - 1)
    measured = before.measured_answers
    return replace(
        before, tokens_per_s=moved(before.tokens_per_s, sample, measured),
        measured_answers=measured + 1,
    )  # fmt: skip
