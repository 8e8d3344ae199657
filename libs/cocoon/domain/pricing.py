"""What a job costs and who gets which part: integers, one rounding, no unit lost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from cocoon.contracts.events import Quote
from cocoon.kernel.money import BASIS_POINTS, ceil_div

TOKENS_PER_PRICE_UNIT = 1_000_000  # prices are nanoTON per million tokens


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Counts of a receipt. `input` includes `cached_input`; `output` includes `reasoning`."""

    input: int
    cached_input: int
    output: int
    reasoning: int

    def __post_init__(self) -> None:
        if not 0 <= self.cached_input <= self.input or not 0 <= self.reasoning <= self.output:
            raise ValueError("cached and reasoning tokens are parts of input and output")


@dataclass(frozen=True, slots=True)
class Split:
    """A price's two parts, in nanoTON; they sum to the price."""

    provider: int
    fee: int


@lru_cache(maxsize=1024)
def quote_id(quote: Quote) -> str:
    """SHA-256 (hex) over "cai/1 quote\\0" and the quote's canonical JSON."""
    return hashlib.sha256(b"cai/1 quote\0" + quote.to_canonical()).hexdigest()


def price(quote: Quote, counts: TokenCounts) -> int:
    """The job's price in nanoTON: one integer, rounded once, up."""
    return ceil_div(
        (counts.input - counts.cached_input) * quote.input_nanoton_per_mtok
        + counts.cached_input * quote.cached_input_nanoton_per_mtok
        + counts.output * quote.output_nanoton_per_mtok,
        TOKENS_PER_PRICE_UNIT,
    )


def greatest_price(quote: Quote, max_input_tokens: int, max_output_tokens: int) -> int:
    """The most that a job within these bounds can cost: its hold."""
    dearest_input = max(quote.input_nanoton_per_mtok, quote.cached_input_nanoton_per_mtok)
    return ceil_div(
        max_input_tokens * dearest_input + max_output_tokens * quote.output_nanoton_per_mtok,
        TOKENS_PER_PRICE_UNIT,
    )


def split(price_nanoton: int, fee_bps: int) -> Split:
    """The provider's share is floored; the operator gets the rest."""
    provider = price_nanoton * (BASIS_POINTS - fee_bps) // BASIS_POINTS
    return Split(provider=provider, fee=price_nanoton - provider)
