"""What an offer would have earned with a log's jobs: each first match decided again with it there.

Pure and repeatable: every draw is SHA-256 over the job. Jobs are what the log holds of them: ids,
bounds, counts. docs/provider-guide.md says what is assumed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from cocoon.contracts.commands import Candidate, RequestJob
from cocoon.contracts.events import Quote
from cocoon.contracts.matching import MatchingPolicy
from cocoon.domain import matching, pricing
from cocoon.domain.leasing import need_of, requested_of
from cocoon.domain.pricing import TokenCounts

MAX_RECIPIENTS: Final = 3  # that a client seals to
MOST_OVER_MEDIAN: Final = 4  # times the middle price: beyond, clients do not seal to it
MIN_JOBS: Final = 50  # fewer say nothing of an hour
BLOCKS: Final = 24  # of equal length that the time is cut into, for the interval
RESAMPLES: Final = 1000
LOW, HIGH = 50, 949  # of 1,000 resamples in order: 90 % lie between
HOUR_MS: Final = 3_600_000
_PPM: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the log. `counts`: of its paid result, None where nothing was paid for.

    `took_ms`: from its match to its result; it fills a place for so long.
    """

    command: RequestJob
    counts: TokenCounts | None
    took_ms: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What is tried: prices and places. `others`: who else offers the model now."""

    provider_id: str
    quote: Quote
    concurrency: int
    context_tokens: int
    others: int
    policy: MatchingPolicy | None
    tier: str | None = None  # None: that of the job's own candidates


@dataclass(frozen=True, slots=True)
class Estimate:
    """nanoTON per hour. `jobs`: looked at; `won`: by the offer; `span_ms`: what they span."""

    jobs: int
    won: int
    span_ms: int
    per_hour: int = 0
    low: int = 0
    high: int = 0

    @property
    def enough(self) -> bool:
        return self.jobs >= MIN_JOBS and self.span_ms > 0


class Draws:
    """Numbers that are the same for the same names."""

    def __init__(self, *names: str) -> None:
        self._seed = hashlib.sha256("\0".join(("cocoon demand", *names)).encode()).digest()
        self._count = 0

    def below(self, limit: int) -> int:
        """Even to within limit / 2**64."""
        self._count += 1
        digest = hashlib.sha256(self._seed + self._count.to_bytes(8, "big")).digest()
        return int.from_bytes(digest[:8], "big") % limit

    def small(self, limit: int) -> Iterator[int]:
        """Without end; even to within limit / 2**32, and eight of them for the work of one."""
        while True:
            self._count += 1
            digest = hashlib.sha256(self._seed + self._count.to_bytes(8, "big")).digest()
            for at in range(0, 32, 4):
                yield int.from_bytes(digest[at : at + 4], "big") % limit


@dataclass(slots=True)
class Simulation:
    """Give it the jobs in order of time, then ask for the estimate."""

    offer: Offer
    jobs: int = 0
    won: int = 0
    first_ms: int = 0
    last_ms: int = 0
    _earned: list[tuple[int, int]] = field(default_factory=list)  # (when, nanoTON)
    _ends_ms: list[int] = field(default_factory=list)  # of the jobs that it runs, a heap

    def take(self, job: Job) -> bool:
        """Decide one job again; whether the offer gets it."""
        command = job.command
        if command.available_nanoton < command.max_price_nanoton:
            return False  # nobody was sought
        self.first_ms = self.first_ms or command.now_ms
        self.last_ms = max(self.last_ms, command.now_ms)
        self.jobs += 1
        while self._ends_ms and self._ends_ms[0] <= command.now_ms:
            heapq.heappop(self._ends_ms)
        chosen = self._chosen(command)
        if chosen is None:
            return False
        self.won += 1
        heapq.heappush(self._ends_ms, command.now_ms + job.took_ms)
        if job.counts is not None:
            price = pricing.price(self.offer.quote, job.counts)
            part = pricing.split(price, self.offer.quote.fee_bps).provider
            self._earned.append((command.now_ms, part))
        return True

    def estimate(self) -> Estimate:
        """Per hour, with an interval from blocks of time drawn again and again."""
        span_ms = self.last_ms - self.first_ms
        found = Estimate(self.jobs, self.won, span_ms)
        if not found.enough:
            return found
        sums = [0] * BLOCKS
        for at_ms, nanoton in self._earned:
            sums[min(BLOCKS - 1, (at_ms - self.first_ms) * BLOCKS // span_ms)] += nanoton
        draws = Draws("blocks", self.offer.provider_id).small(BLOCKS)
        totals = sorted(
            sum(sums[next(draws)] for _ in range(BLOCKS)) for _ in range(RESAMPLES)
        )  # fmt: skip
        mean, low, high = (
            total * HOUR_MS // span_ms for total in (sum(sums), totals[LOW], totals[HIGH])
        )
        return replace(found, per_hour=mean, low=low, high=high)

    # ---- one job ----

    def _chosen(self, command: RequestJob) -> Candidate | None:
        """The offer as a candidate, if the client sealed to it and the policy took it."""
        bounds = command.max_input_tokens, command.max_output_tokens
        rest = [c for c in command.candidates if c.provider_id != self.offer.provider_id]
        prices = sorted(pricing.greatest_price(c.quote, *bounds) for c in rest)
        own_price = pricing.greatest_price(self.offer.quote, *bounds)
        if prices and own_price > MOST_OVER_MEDIAN * prices[(len(prices) - 1) // 2]:
            return None
        draws = Draws(command.job_id, self.offer.provider_id)
        if draws.below(_PPM) >= self._chance_ppm(own_price, prices):
            return None
        while len(rest) >= MAX_RECIPIENTS:
            del rest[draws.below(len(rest))]
        own = self._candidate(command, rest)
        need = need_of(
            requested_of(command), command.now_ms, asked=command.preferences,
            affinity=command.affinity, open_limits=command.open_limits,
        )  # fmt: skip
        need = replace(
            need,
            max_price_nanoton=max(command.max_price_nanoton, own_price),
            recipient_key_ids=(*(c.key_id for c in rest), own.key_id),
        )
        policy = self.offer.policy or command.policy
        chosen = matching.choose((*rest, own), need, command.seed, policy)
        return own if isinstance(chosen, Candidate) and chosen == own else None

    def _chance_ppm(self, own_price: int, prices: list[int]) -> int:
        """How likely a client seals to it: cheap ones are drawn up to three times as often."""
        others = max(self.offer.others, len(prices))
        if others < MAX_RECIPIENTS:
            return _PPM
        dearest = max((*prices, own_price, 1))
        weights = [_PPM * dearest // (dearest + 2 * price) for price in (own_price, *prices)]
        theirs = sum(weights[1:]) * others // len(prices) if prices else weights[0] * others
        return min(_PPM, MAX_RECIPIENTS * weights[0] * _PPM // (weights[0] + theirs))

    def _candidate(self, command: RequestJob, rest: list[Candidate]) -> Candidate:
        """As good as the middle one of the others, with no history to be ashamed of."""
        measured = sorted(c.first_token_us for c in rest if c.first_token_us)
        return Candidate(
            provider_id=self.offer.provider_id,
            key_id="0" * 32,
            quote=self.offer.quote,
            evidence_id="0" * 64,
            signing_key="0" * 64,
            attested_position=1,
            valid_until_ms=command.now_ms + HOUR_MS,
            context_tokens=self.offer.context_tokens,
            running=len(self._ends_ms),
            concurrency=self.offer.concurrency,
            first_token_us=measured[len(measured) // 2] if measured else 0,
            alive=True,
            tier=self.offer.tier or next((c.tier for c in rest), None),
            quantisation=next((c.quantisation for c in rest), None),
            region=next((c.region for c in rest), None),
            tokens_per_s=max((c.tokens_per_s for c in rest), default=0),
            ended_jobs=max((c.ended_jobs for c in rest), default=0),
        )
