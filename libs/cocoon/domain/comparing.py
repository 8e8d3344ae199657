"""How far an answer is from a reference's: distances in basis points, and one canary's judgement.

Pure. It holds content only while it compares; what leaves is an outcome and a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

WHOLE_BPS: Final = 10_000
MAX_CHARS: Final = 400  # up to here texts are compared by characters, beyond it by words
MAX_WORDS: Final = 600
_WORDS: Final = re.compile(r"\w+|[^\w\s]")
SAME_COUNT_BPS: Final = 200  # engines count the ends of an answer differently
SAME_COUNT_TOKENS: Final = 8
MOST_NATS: Final = 1.0  # a difference of log probabilities from here on is a whole one
TIE_NATS: Final = 0.1  # two tokens as likely as this may change places between engines

Outcome = Literal["passed", "differed", "unclear"]


@dataclass(frozen=True, slots=True)
class Token:
    """A token, its natural log probability, and its likeliest rivals with theirs."""

    text: str = field(repr=False)
    logprob: float
    rivals: tuple[tuple[str, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Told:
    """One engine's greedy answer. `output_tokens` as the engine counted; tokens where it tells."""

    text: str = field(repr=False)
    output_tokens: int
    tokens: tuple[Token, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One canary's outcome. `why`: text, counts, near_tie, nothing_said."""

    outcome: Outcome
    distance_bps: int
    why: str = "text"


def judge(reference: Told, given: Told, tolerance_bps: int) -> Judgement:
    """Whether `given` is what the reference's model would say, within the tolerance.

    It differs too where the text is the same and far more tokens are claimed for it. Unclear: the
    reference says nothing, or the texts part where the reference had two tokens as likely.
    """
    if not reference.text:
        return Judgement("unclear", 0, "nothing_said")
    distance = text_distance_bps(reference.text, given.text)
    if distance > tolerance_bps:
        if _near_tie(reference.tokens, given.text):
            return Judgement("unclear", distance, "near_tie")
        return Judgement("differed", distance)
    slack_bps = SAME_COUNT_BPS + tolerance_bps
    allowed = reference.output_tokens * (WHOLE_BPS + slack_bps) // WHOLE_BPS + SAME_COUNT_TOKENS
    if given.output_tokens > allowed:
        surplus = given.output_tokens - reference.output_tokens
        return Judgement(
            "differed",
            min(WHOLE_BPS, surplus * WHOLE_BPS // max(reference.output_tokens, 1)),
            "counts",
        )
    return Judgement("passed", distance)


def text_distance_bps(reference: str, given: str) -> int:
    """Edit distance over the longer one's length: 0 the same, 10,000 nothing in common.

    By characters up to 400, else by words and marks, the first 600 of them.
    """
    if reference == given:
        return 0
    first: Sequence[str]
    second: Sequence[str]
    if max(len(reference), len(given)) <= MAX_CHARS:
        first, second = reference, given
    else:
        first = _WORDS.findall(reference)[:MAX_WORDS]
        second = _WORDS.findall(given)[:MAX_WORDS]
    longer = max(len(first), len(second))
    if not longer:
        return WHOLE_BPS  # other white space only, and too much of it
    return edit_distance(first, second) * WHOLE_BPS // longer


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's: insertions, deletions and replacements of one item each."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for at, one in enumerate(first, 1):
        corner, row[0] = row[0], at
        for column, other in enumerate(second, 1):
            least = corner if one == other else 1 + min(corner, row[column], row[column - 1])
            corner, row[column] = row[column], least
    return row[-1]


def compare_embeddings(reference: Sequence[float], given: Sequence[float]) -> int:
    """1 - cosine in basis points, at most 10,000; other lengths or no direction: 10,000."""
    if len(reference) != len(given):
        return WHOLE_BPS
    norms = math.hypot(*reference) * math.hypot(*given)
    if not math.isfinite(norms) or norms <= 0:
        return WHOLE_BPS
    cosine = math.fsum(a * b for a, b in zip(reference, given, strict=True)) / norms
    return min(WHOLE_BPS, max(0, round((1 - cosine) * WHOLE_BPS)))


def compare_logprobs(reference: Sequence[Token], given: Sequence[Token]) -> int | None:
    """Mean difference of log probabilities over the tokens that both begin with, one nat being
    10,000; None where there is none.
    """
    shared = _shared(reference, given)
    if not shared:
        return None
    apart = math.fsum(
        min(MOST_NATS, abs(a.logprob - b.logprob))
        for a, b in zip(reference[:shared], given[:shared], strict=True)
    )
    return round(apart / shared / MOST_NATS * WHOLE_BPS)


def _shared(reference: Sequence[Token], given: Sequence[Token]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(reference, given, strict=False)):
        if one.text != other.text:
            return at
    return min(len(reference), len(given))


def _near_tie(reference: Sequence[Token], given: str) -> bool:
    """Whether the answers part where the reference held another token for about as likely, and
    the given text goes on with that one.
    """
    at = 0
    for token in reference:
        if given.startswith(token.text, at):
            at += len(token.text)
            continue
        return any(
            bool(text) and given.startswith(text, at) and token.logprob - logprob <= TIE_NATS
            for text, logprob in token.rivals
        )
    return False
