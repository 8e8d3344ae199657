"""Who gets the job: hard filters, then the better of two drawn by the decision's seed.

Integers only, so that the same snapshot and seed give the same provider on every machine.
The whole policy (affinity, utility, exploration) grows here; see docs/adr.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cocoon.contracts.commands import Candidate
from cocoon.domain.pricing import greatest_price

DEFAULT_FIRST_TOKEN_US = 50_000  # a provider without a history is taken to need 50 ms


@dataclass(frozen=True, slots=True)
class Need:
    """What the job demands of a provider."""

    model_id: str
    recipient_key_ids: tuple[str, ...]
    max_price_nanoton: int
    max_input_tokens: int
    max_output_tokens: int
    now_ms: int
    excluded_providers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class NoCandidate:
    """Nothing is left: the filter that emptied the list, and a sentence for the client."""

    emptied_by: str
    message: str

    @property
    def is_capacity(self) -> bool:
        return self.emptied_by == "capacity"


_SENTENCES = {
    "recipient": "no provider that this request is sealed to is known to the network; "
    "fetch the directory again and seal to its current keys",
    "model": "none of the providers that this request is sealed to offers this model",
    "attestation": "the evidence of the providers that this request is sealed to has run out; "
    "fetch the directory again and seal to its current keys",
    "alive": "the providers that this request is sealed to are not answering; try again shortly",
    "context": "the request's token bounds exceed the context of every provider it is sealed to",
    "price": "max_price is below what this job can cost at any provider it is sealed to",
    "tried": "every provider that this request is sealed to has already failed this job",
    "capacity": "all providers that this request is sealed to are busy; try again shortly",
}


def _filters(need: Need) -> list[tuple[str, object]]:
    keys = frozenset(need.recipient_key_ids)
    tokens = need.max_input_tokens + need.max_output_tokens
    return [
        ("recipient", lambda c: c.key_id in keys),
        ("model", lambda c: c.quote.model_id == need.model_id),
        ("attestation", lambda c: c.valid_until_ms > need.now_ms),
        ("alive", lambda c: c.alive),
        ("context", lambda c: tokens <= c.context_tokens),
        (
            "price",
            lambda c: (
                greatest_price(c.quote, need.max_input_tokens, need.max_output_tokens)
                <= need.max_price_nanoton
            ),
        ),
        ("tried", lambda c: c.provider_id not in need.excluded_providers),
        ("capacity", lambda c: c.running < c.concurrency),
    ]


def _expected_wait(candidate: Candidate) -> tuple[int, int]:
    """(queue + 1) / capacity x time to first token, as a fraction of integers."""
    first_token_us = candidate.first_token_us or DEFAULT_FIRST_TOKEN_US
    return (candidate.running + 1) * first_token_us, candidate.concurrency


def _better(a: Candidate, b: Candidate) -> Candidate:
    (a_num, a_den), (b_num, b_den) = _expected_wait(a), _expected_wait(b)
    left, right = a_num * b_den, b_num * a_den
    if left != right:
        return a if left < right else b
    return a if a.provider_id <= b.provider_id else b


def choose(candidates: tuple[Candidate, ...], need: Need, seed: str) -> Candidate | NoCandidate:
    """Return the provider for `need`, or which filter left nobody.

    `seed` is 64 hex digits; the draw is a function of it and of the candidates' order by id.
    """
    left = sorted(candidates, key=lambda c: (c.provider_id, c.key_id))
    for name, keep in _filters(need):
        left = [c for c in left if keep(c)]  # type: ignore[operator]
        if not left:
            return NoCandidate(emptied_by=name, message=_SENTENCES[name])
    if len(left) == 1:
        return left[0]
    draw = hashlib.sha256(b"cocoon two choices\0" + bytes.fromhex(seed)).digest()
    first = int.from_bytes(draw[:8], "big") % len(left)
    second = int.from_bytes(draw[8:16], "big") % (len(left) - 1)
    return _better(left[first], left[second if second < first else second + 1])
