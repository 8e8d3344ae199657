"""Who gets the job: hard filters, then preferences, exploration, a warm set, the better of two.

Integers only, so that the same snapshot, policy and seed give the same provider on every machine;
`explain` tells each candidate why. Commands from before policies are decided as they were then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cocoon.contracts.commands import Candidate
from cocoon.contracts.matching import MatchingPolicy, OpenTierLimits, Preferences
from cocoon.domain.open_tier import OPEN, fits
from cocoon.domain.pricing import greatest_price

DEFAULT_FIRST_TOKEN_US = 50_000  # a provider without a history is taken to need 50 ms
MOST_PLACES = 64  # of a provider, as far as waits and loads go
NEWCOMER_PPM = 900_000  # of a newcomer's jobs are taken to end well, at most
NOTHING_ASKED = Preferences()
T = TypeVar("T")
_FULL = 1000  # a term of the utility lies between 0 and this


@dataclass(frozen=True, slots=True)
class Need:
    """What the job demands of a provider. `affinity`: a blind key that only its client can make."""

    model_id: str
    recipient_key_ids: tuple[str, ...]
    max_price_nanoton: int
    max_input_tokens: int
    max_output_tokens: int
    now_ms: int
    excluded_providers: frozenset[str] = frozenset()
    preferences: Preferences = field(default=NOTHING_ASKED)
    affinity: str = ""  # hex
    open_limits: OpenTierLimits | None = None  # None: nobody of the open tier may have it


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Nothing is left: the filter that emptied the list, and a sentence for the client."""

    emptied_by: str
    message: str

    @property
    def is_capacity(self) -> bool:
        return self.emptied_by == "capacity"


@dataclass(frozen=True, slots=True)
class Standing:
    """How one candidate fared. `by`: the filter, the preference or the term that decided it."""

    provider_id: str
    outcome: str  # won, filtered, passed_by, not_drawn, lost
    by: str
    margin_permille: int = 0  # lost: how much better the winner's term was


Tell = Callable[[Candidate, str, str, int], None]
Keep = Callable[[Candidate], bool]

_SENTENCES = {
    "recipient": "no provider that this request is sealed to is known to the network; "
    "fetch the directory again and seal to its current keys",
    "model": "none of the providers that this request is sealed to offers this model",
    "attestation": "the evidence of the providers that this request is sealed to has run out; "
    "fetch the directory again and seal to its current keys",
    "alive": "the providers that this request is sealed to are not answering; try again shortly",
    "only": "none of the providers in `only` is among those that this request is sealed to",
    "ignore": "every provider that this request is sealed to is on its `ignore` list",
    "tier": "no provider that this request is sealed to is of a tier that it asks for",
    "quantisation": "no provider that this request is sealed to serves a quantisation that it "
    "asks for",
    "region": "no provider that this request is sealed to is in a region that it asks for",
    "open_limits": "the network's policy allows the providers without a TEE that this request is "
    "sealed to no job of this price; allow fewer tokens, or other tiers",
    "token_price": "every provider that this request is sealed to asks more per token than it "
    "allows",
    "context": "the request's token bounds exceed the context of every provider it is sealed to",
    "price": "max_price is below what this job can cost at any provider it is sealed to",
    "tried": "every provider that this request is sealed to has already failed this job",
    "capacity": "all providers that this request is sealed to are busy; try again shortly",
    "order": "none of the providers in `order` can take this job, and it allows no others",
}


def choose(
    candidates: tuple[Candidate, ...], need: Need, seed: str, policy: MatchingPolicy | None = None
) -> Candidate | NoCandidate:
    """Return the provider for `need`, or which filter left nobody.

    `seed` is 64 hex digits; the draw is a function of it and of the candidates' order by id.
    Without a policy it is decided as before there were any: filters and the better of two.
    """
    return _decide(candidates, need, seed, policy, _told_nobody)


def explain(
    candidates: tuple[Candidate, ...], need: Need, seed: str, policy: MatchingPolicy | None = None
) -> tuple[Standing, ...]:
    """How each candidate fared in the very decision that `choose` makes, by provider."""
    found: list[Standing] = []

    def tell(candidate: Candidate, outcome: str, by: str, margin: int) -> None:
        found.append(Standing(candidate.provider_id, outcome, by, margin))

    chosen = _decide(candidates, need, seed, policy, tell)
    if isinstance(chosen, Candidate):
        told = [standing for standing in found if standing.outcome == "won"]
        if not told:
            tell(chosen, "won", "only one left", 0)
    return tuple(sorted(found, key=lambda one: (one.provider_id, one.outcome)))


def _told_nobody(candidate: Candidate, outcome: str, by: str, margin: int) -> None:
    """`choose` needs the winner alone."""


def _decide(
    candidates: tuple[Candidate, ...], need: Need, seed: str, policy: MatchingPolicy | None,
    tell: Tell,
) -> Candidate | NoCandidate:  # fmt: skip
    left = _filtered(candidates, need, tell)
    if isinstance(left, NoCandidate):
        return left
    if policy is None:
        return _first_policy(left, seed, tell)
    asked = need.preferences
    if asked.order:
        named = [c for name in asked.order for c in left if c.provider_id == name]
        if named:
            return _first_of(named, left, "order", tell)
    if asked.sort is not None:
        return _first_of(_sorted_by(asked.sort, left, need), left, f"sort:{asked.sort}", tell)
    return _by_policy(left, need, _Draw(seed), policy, tell)


# ---- hard filters ----


def _filters(need: Need, some_open: bool) -> list[tuple[str, Keep]]:
    keys, asked = frozenset(need.recipient_key_ids), need.preferences
    tokens = need.max_input_tokens + need.max_output_tokens
    found: list[tuple[str, Keep]] = [
        ("recipient", lambda c: c.key_id in keys),
        ("model", lambda c: c.quote.model_id == need.model_id),
        ("attestation", lambda c: c.valid_until_ms > need.now_ms),
        ("alive", lambda c: c.alive),
    ]
    open_asked = OPEN in asked.tiers
    if some_open and not open_asked:
        found.append(("tier", lambda c: c.tier != OPEN))
    if asked is not NOTHING_ASKED:
        found += _asked_filters(asked)
    if some_open and open_asked:
        found.append(("open_limits", lambda c: c.tier != OPEN or _open_may_cost(c, need)))
    return [
        *found,
        ("context", lambda c: tokens <= c.context_tokens),
        (
            "price",
            lambda c: (
                greatest_price(c.quote, need.max_input_tokens, need.max_output_tokens)
                <= need.max_price_nanoton
            ),
        ),
        ("tried", lambda c: c.provider_id not in need.excluded_providers),
        (
            "capacity",
            lambda c: c.running < c.concurrency and (c.tier != OPEN or _has_room(c, need)),
        ),
    ]


def _open_may_cost(candidate: Candidate, need: Need) -> bool:
    """Who has no TEE gets no job that can cost more than the network's policy allows."""
    cost = greatest_price(candidate.quote, need.max_input_tokens, need.max_output_tokens)
    return fits(need.open_limits, running=0, most_nanoton=cost)


def _has_room(candidate: Candidate, need: Need) -> bool:
    """Nor more jobs at once."""
    return fits(need.open_limits, running=candidate.running, most_nanoton=0)


def _asked_filters(asked: Preferences) -> list[tuple[str, Keep]]:
    """Only what the client set; a candidate that says nothing of it does not pass."""
    found: list[tuple[str, Keep]] = []
    if asked.order and not asked.fallbacks:
        found.append(("order", lambda c: c.provider_id in asked.order))
    if asked.only:
        found.append(("only", lambda c: c.provider_id in asked.only))
    if asked.ignore:
        found.append(("ignore", lambda c: c.provider_id not in asked.ignore))
    if asked.tiers:
        found.append(("tier", lambda c: c.tier in asked.tiers))
    if asked.quantisations:
        found.append(("quantisation", lambda c: c.quantisation in asked.quantisations))
    if asked.regions:
        found.append(("region", lambda c: c.region in asked.regions))
    most_in, most_out = asked.max_input_nanoton_per_mtok, asked.max_output_nanoton_per_mtok
    if most_in is not None:
        found.append(("token_price", lambda c: c.quote.input_nanoton_per_mtok <= most_in))
    if most_out is not None:
        found.append(("token_price", lambda c: c.quote.output_nanoton_per_mtok <= most_out))
    return found


def _filtered(
    candidates: Iterable[Candidate], need: Need, tell: Tell
) -> list[Candidate] | NoCandidate:
    some_open = any(c.tier == OPEN for c in candidates)
    if tell is _told_nobody and not some_open:
        fitting = _fitting(candidates, need)
        if fitting:
            return fitting
    left = _in_order(candidates)
    for name, keep in _filters(need, some_open):
        kept = [c for c in left if keep(c)]
        if tell is not _told_nobody and len(kept) < len(left):
            _tell_all(tell, [c for c in left if c not in kept], "filtered", name)
        if not kept:
            return NoCandidate(emptied_by=name, message=_SENTENCES[name])
        left = kept
    return left


def _in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The draws are functions of this order."""
    return sorted(candidates, key=lambda c: (c.provider_id, c.key_id))


def _fitting(candidates: Iterable[Candidate], need: Need) -> list[Candidate]:
    """Whom all filters leave, in one look at each: what most decisions need to know of them."""
    keys, model_id, now_ms = need.recipient_key_ids, need.model_id, need.now_ms
    max_input, max_output = need.max_input_tokens, need.max_output_tokens
    left = [
        c
        for c in candidates
        if c.running < c.concurrency
        and c.alive
        and c.key_id in keys
        and c.quote.model_id == model_id
        and c.valid_until_ms > now_ms
        and max_input + max_output <= c.context_tokens
        and c.provider_id not in need.excluded_providers
        and greatest_price(c.quote, max_input, max_output) <= need.max_price_nanoton
    ]
    if need.preferences is not NOTHING_ASKED:
        for _, keep in _asked_filters(need.preferences):
            left = [c for c in left if keep(c)]
    return _in_order(left) if len(left) > 1 else left


def _tell_all(tell: Tell, candidates: Iterable[Candidate], outcome: str, by: str) -> None:
    if tell is not _told_nobody:
        for candidate in candidates:
            tell(candidate, outcome, by, 0)


# ---- what the client ranks itself ----


def _sorted_by(sort: str, left: Sequence[Candidate], need: Need) -> list[Candidate]:
    """The best first; equal ones by their load, so that they share the jobs."""

    def key(candidate: Candidate) -> tuple[int, int, str]:
        if sort == "price":
            best = greatest_price(
                candidate.quote, need.max_input_tokens, need.max_output_tokens
            )  # fmt: skip
        elif sort == "latency":
            best = _wait_ns(candidate)
        else:
            best = -candidate.tokens_per_s
        return best, _load_permille(candidate), candidate.provider_id

    return sorted(left, key=key)


def _first_of(
    ranked: Sequence[Candidate], left: Sequence[Candidate], by: str, tell: Tell
) -> Candidate:
    _tell_all(tell, [c for c in left if c is not ranked[0]], "lost", by)
    tell(ranked[0], "won", by, 0)
    return ranked[0]


# ---- the policy ----


class _Draw:
    """Numbers of one decision: SHA-256 over its seed and a counter."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = b"cocoon matching\0" + bytes.fromhex(seed), 0

    def below(self, limit: int) -> int:
        """Even to within limit / 2**64."""
        self._count += 1
        digest = hashlib.sha256(self._seed + self._count.to_bytes(4, "big")).digest()
        return int.from_bytes(digest[:8], "big") % limit

    def two(self, of: Sequence[Candidate]) -> tuple[Candidate, Candidate]:
        first, second = self.below(len(of)), self.below(len(of) - 1)
        return of[first], of[second if second < first else second + 1]


def _by_policy(
    left: list[Candidate], need: Need, draw: _Draw, policy: MatchingPolicy, tell: Tell
) -> Candidate:
    measured = sorted(c.first_token_us for c in left if c.first_token_us)
    middle_us = measured[len(measured) // 2] if measured else DEFAULT_FIRST_TOKEN_US
    limit_us = max(policy.slow_us, middle_us * policy.slow_factor_permille // 1000)
    unsure = [c for c in left if c.ended_jobs < policy.explore_jobs or c.first_token_us > limit_us]
    if 0 < len(unsure) < len(left) and draw.below(1_000_000) < policy.explore_ppm:
        return _first_of([unsure[draw.below(len(unsure))]], left, "exploration", tell)
    swift = [c for c in left if c.first_token_us <= limit_us]
    pool = _narrowed(left, swift, "slow", tell)
    if need.affinity:
        pool = _narrowed(pool, _warm(pool, need.affinity, policy), "warm_set", tell)
    if len(pool) == 1:
        tell(pool[0], "won", "only one left", 0)
        return pool[0]
    a, b = draw.two(pool)
    if tell is not _told_nobody:
        rest = [c for c in pool if c is not a and c is not b]
        _tell_all(tell, rest, "not_drawn", "two_choices")
    return _better(a, b, need, policy, middle_us, tell)


def _narrowed(left: list[Candidate], kept: list[Candidate], by: str, tell: Tell) -> list[Candidate]:
    if tell is not _told_nobody:
        _tell_all(tell, [c for c in left if c not in kept], "passed_by", by)
    return kept


def _warm(pool: list[Candidate], affinity: str, policy: MatchingPolicy) -> list[Candidate]:
    """Who keeps this conversation's prefix, by rendezvous hashing; if they are too full, those
    who are not.
    """
    ranked = warmest(pool, affinity, lambda c: c.provider_id)
    limit = min(map(_load_permille, pool)) + policy.spill_permille
    warm = [c for c in ranked[: policy.warm] if _load_permille(c) <= limit]
    return warm or [c for c in pool if _load_permille(c) <= limit]


def warmest(of: Iterable[T], affinity: str, name: Callable[[T], str]) -> list[T]:
    """Rendezvous hashing: who leaves or comes moves nobody else's conversations."""
    key = bytes.fromhex(affinity)
    return sorted(of, key=lambda one: hashlib.sha256(key + name(one).encode()).digest())


def _places(candidate: Candidate) -> int:
    """Bounded: they are the provider's own word, and thousands promised are no idle machine."""
    return min(candidate.concurrency, MOST_PLACES)


def _load_permille(candidate: Candidate) -> int:
    return candidate.running * 1000 // _places(candidate)


def expected_wait_us(candidate: Candidate) -> int:
    """How long a job is taken to wait for its first token there, in microseconds."""
    return _wait_ns(candidate) // 1000


def _wait_ns(candidate: Candidate, at_least_us: int = 0) -> int:
    """(running + 1) / places x time to first token."""
    first_token_us = max(candidate.first_token_us or DEFAULT_FIRST_TOKEN_US, at_least_us)
    return (candidate.running + 1) * first_token_us * 1000 // _places(candidate) + 1


_TERMS = ("speed", "price", "success")


def _terms(
    candidate: Candidate, wait_ns: int, fastest_ns: int, need: Need, policy: MatchingPolicy
) -> tuple[int, int, int]:
    """As _TERMS names them, each between 0 and 1000 of its weight: nobody wins all by one of them.

    The price counts as a part of what the client allows, never as a divisor: a tenth of the price
    is not worth ten times the speed.
    """
    cost = greatest_price(candidate.quote, need.max_input_tokens, need.max_output_tokens)
    cap = max(need.max_price_nanoton, 1)
    success_ppm = candidate.success_ppm
    if candidate.ended_jobs < policy.explore_jobs:
        success_ppm = min(success_ppm, NEWCOMER_PPM)
    return (
        policy.speed_weight * (_FULL * fastest_ns // wait_ns),
        policy.price_weight * (_FULL * max(0, cap - cost) // cap),
        policy.success_weight * ((success_ppm * _FULL + 500_000) // 1_000_000),
    )


def _better(
    a: Candidate, b: Candidate, need: Need, policy: MatchingPolicy, middle_us: int, tell: Tell
) -> Candidate:
    """The one of the greater utility; of two equal ones the first drawn.

    Who has no history yet is taken to be no faster than the middle one: another name is free.
    """
    a_waits_ns = _wait_ns(a, middle_us if a.ended_jobs < policy.explore_jobs else 0)
    b_waits_ns = _wait_ns(b, middle_us if b.ended_jobs < policy.explore_jobs else 0)
    fastest_ns = min(a_waits_ns, b_waits_ns)
    of_a = _terms(a, a_waits_ns, fastest_ns, need, policy)
    of_b = _terms(b, b_waits_ns, fastest_ns, need, policy)
    a_wins = sum(of_a) >= sum(of_b)
    winner, loser = (a, b) if a_wins else (b, a)
    if tell is not _told_nobody:
        better, worse = (of_a, of_b) if a_wins else (of_b, of_a)
        gap, name = max(
            (mine - theirs, name) for name, mine, theirs in zip(_TERMS, better, worse, strict=True)
        )
        weight = max(1, getattr(policy, f"{name}_weight"))
        tell(winner, "won", name if gap else "draw", 0)
        tell(loser, "lost", name if gap else "draw", gap // weight)
    return winner


# ---- before there were policies ----


def _first_policy(left: Sequence[Candidate], seed: str, tell: Tell) -> Candidate:
    """The better of two by expected wait alone. It decides old commands again: never change it."""
    if len(left) == 1:
        return left[0]
    draw = hashlib.sha256(b"cocoon two choices\0" + bytes.fromhex(seed)).digest()
    first = int.from_bytes(draw[:8], "big") % len(left)
    second = int.from_bytes(draw[8:16], "big") % (len(left) - 1)
    a, b = left[first], left[second if second < first else second + 1]
    _tell_all(tell, [c for c in left if c is not a and c is not b], "not_drawn", "two_choices")
    (a_num, a_den), (b_num, b_den) = _expected_wait(a), _expected_wait(b)
    ours, theirs = a_num * b_den, b_num * a_den
    a_wins = ours < theirs or (ours == theirs and a.provider_id <= b.provider_id)
    tell(a if a_wins else b, "won", "speed", 0)
    tell(b if a_wins else a, "lost", "speed", 0)
    return a if a_wins else b


def _expected_wait(candidate: Candidate) -> tuple[int, int]:
    """(queue + 1) / capacity x time to first token, as a fraction of integers."""
    first_token_us = candidate.first_token_us or DEFAULT_FIRST_TOKEN_US
    return (candidate.running + 1) * first_token_us, candidate.concurrency
