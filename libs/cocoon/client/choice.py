"""Which verified providers a request is sealed to: filters, then a draw for the cheap and idle.

Pure: the whole directory is judged here, so nobody can steer one client to one provider.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cocoon.contracts.events import Quote
from cocoon.contracts.matching import Preferences
from cocoon.domain.matching import warmest
from cocoon.domain.pricing import greatest_price
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import BadRequest, EvidenceRejected
from cocoon.sealing import KeyBundle

MAX_RECIPIENTS = 3
_BUSY_FACTOR = 16.0  # how much dearer a full provider looks
MOST_OVER_MEDIAN = 4  # who asks more than this times the middle price is sealed to by name only
HOW_TO_ASK = (
    "Open ones have no TEE, and who owns such a machine can read prompts; to use them all the "
    "same, name the tier `open`."
)
_WARM = 2  # of the recipients: the third is drawn, so that the warm ones' load can go elsewhere


@dataclass(frozen=True, slots=True)
class Addressee:
    """One provider that a request was sealed to: what its answer is checked by."""

    provider_id: str
    signing_key: bytes  # the attested Ed25519 key
    assurance: Assurance


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider whose evidence, model and current key were verified here."""

    provider_id: str
    signing_key: bytes  # the attested Ed25519 key
    assurance: Assurance
    bundle: KeyBundle
    quote: Quote
    context_tokens: int
    running: int
    concurrency: int
    valid_until_ms: int  # of its evidence
    quantisation: str | None = None  # as it says; whoever has the model's manifest can check it
    region: str | None = None  # as it says; nobody can check it

    @property
    def addressee(self) -> Addressee:
        return Addressee(self.provider_id, self.signing_key, self.assurance)

    @property
    def ends_ms(self) -> int:
        """Until when it may be sealed to: its key's end, or its evidence's."""
        return min(self.bundle.not_after_ms, self.valid_until_ms)


def with_assurance(
    candidates: Sequence[Candidate], accepted: Collection[Assurance]
) -> list[Candidate]:
    """Those of an accepted tier. Raises EvidenceRejected(assurance) when none is left."""
    left = [item for item in candidates if item.assurance in accepted]
    if candidates and not left:
        offered = ", ".join(sorted({item.assurance.value for item in candidates}))
        asked = ", ".join(sorted(item.value for item in accepted))
        how = f" {HOW_TO_ASK}" if any(i.assurance is Assurance.OPEN for i in candidates) else ""
        raise EvidenceRejected(
            f"The providers of this model are {offered}; this client takes only {asked}.{how}",
            code="assurance",
        )
    return left


def one_model(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates of one model id: the one that most of them serve under the asked name."""
    by_id: dict[str, list[Candidate]] = {}
    for item in candidates:
        by_id.setdefault(item.quote.model_id, []).append(item)
    return max(by_id.items(), key=lambda pair: (len(pair[1]), pair[0]))[1] if by_id else []


def choose(
    candidates: Sequence[Candidate],
    *,
    max_input_tokens: int,
    max_output_tokens: int,
    max_price_nanoton: int | None,
    randomness: Randomness,
    count: int = MAX_RECIPIENTS,
    wishes: Preferences | None = None,
    affinity: str = "",
    open_job_nanoton: int | None = None,
) -> list[Candidate]:
    """Up to `count` candidates: those that the caller ranks, or keep its conversation warm, then
    drawn without repetition; cheap and idle ones are likelier. One without a TEE is among them
    only where no other has a free place, or where the caller orders by name or sorts.

    Raises BadRequest: context_length_exceeded, price_limit (the caller's own limit),
    open_tier_limit (`open_job_nanoton`, the policy's for one job).
    """
    tokens = max_input_tokens + max_output_tokens
    fitting = [item for item in candidates if tokens <= item.context_tokens]
    if not fitting:
        raise BadRequest(
            "The request does not fit the context of any provider of this model; shorten it or "
            "ask for fewer output tokens.",
            code="context_length_exceeded",
        )
    priced = [
        (item, greatest_price(item.quote, max_input_tokens, max_output_tokens)) for item in fitting
    ]
    if max_price_nanoton is not None:
        cheapest = min(price for _, price in priced)
        priced = [(item, price) for item, price in priced if price <= max_price_nanoton]
        if not priced:
            raise BadRequest(
                f"The request may cost {cheapest} nanoTON at the cheapest provider, over this "
                f"client's limit of {max_price_nanoton}; raise the limit or ask for fewer tokens.",
                code="price_limit",
            )
    priced = _protected_first(_within_open_limit(priced, open_job_nanoton), wishes)
    if wishes is None or not wishes.order:
        middle = sorted(price for _, price in priced)[(len(priced) - 1) // 2]
        priced = [(item, price) for item, price in priced if price <= MOST_OVER_MEDIAN * middle]
    first = _ranked(priced, wishes, affinity)[:count]
    dearest = max(price for _, price in priced)
    # An exponential race: who has the smallest time wins, and a low score runs faster.
    drawn = sorted(
        (_score(item, price, dearest) * _exponential(randomness), index)
        for index, (item, price) in enumerate(priced)
        if item not in first
    )
    return [*first, *(priced[index][0] for _, index in drawn)][:count]


def _within_open_limit(
    priced: list[tuple[Candidate, int]], most_nanoton: int | None
) -> list[tuple[Candidate, int]]:
    """Without the open ones at which this job could cost more than the policy lets it there."""
    left = [
        (item, price)
        for item, price in priced
        if item.assurance is not Assurance.OPEN
        or (most_nanoton is not None and price <= most_nanoton)
    ]
    if not left:
        raise BadRequest(
            f"The request may cost {min(price for _, price in priced)} nanoTON, over the "
            f"{most_nanoton or 0} that this network's policy allows one job in the open tier; ask "
            "for fewer tokens, or take providers with a TEE.",
            code="open_tier_limit",
        )
    return left


def _protected_first(
    priced: list[tuple[Candidate, int]], wishes: Preferences | None
) -> list[tuple[Candidate, int]]:
    """Without the open ones while another has a free place, unless the caller ranks them itself:
    those that it names in `order` stay, and all do when it sorts.
    """
    if wishes is not None and wishes.sort is not None:
        return priced
    named = wishes.order if wishes is not None else ()
    free = any(
        item.assurance is not Assurance.OPEN and item.running < item.concurrency
        for item, _ in priced
    )
    if not free:
        return priced
    return [
        (item, price)
        for item, price in priced
        if item.assurance is not Assurance.OPEN or item.provider_id in named
    ]


def _ranked(
    priced: list[tuple[Candidate, int]], wishes: Preferences | None, affinity: str
) -> list[Candidate]:
    """Whom the request is sealed to before anybody is drawn."""
    candidates = [item for item, _ in priced]
    if wishes is not None and wishes.order:
        names = dict.fromkeys(wishes.order)
        return [c for name in names for c in candidates if c.provider_id == name]
    if wishes is not None and wishes.sort == "price":
        return [c for c, _ in sorted(priced, key=lambda one: (one[1], one[0].provider_id))]
    if not affinity:
        return []
    idle = [c for c in candidates if c.running < c.concurrency] or candidates
    return warmest(idle, affinity, lambda c: c.provider_id)[:_WARM]


def _score(candidate: Candidate, price: int, dearest: int) -> float:
    """How long a candidate runs in the race: with its load, and up to three times with its price.

    Bounded: an offer near zero draws three times as often as the dearest, not always.
    """
    load = candidate.running / max(candidate.concurrency, 1)
    waiting = _BUSY_FACTOR if load >= 1 else (1 + load) ** 2
    return (1 + 2 * price / max(dearest, 1)) * waiting


def _exponential(randomness: Randomness) -> float:
    drawn = (int.from_bytes(randomness.token(7), "big") + 1) / (2**56 + 1)
    return -math.log(drawn)
