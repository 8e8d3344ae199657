"""Prices are rounded once, up; a split loses no unit; no job within its bounds exceeds its hold."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts.events import Quote
from cocoon.domain.pricing import TokenCounts, greatest_price, price, quote_id, split
from tests.support.job_world import MODEL, QUOTE
from tests.support.sentences import says_why

prices = st.integers(0, 10**15)
quotes = st.builds(
    Quote,
    model_id=st.just(MODEL),
    input_nanoton_per_mtok=prices,
    cached_input_nanoton_per_mtok=prices,
    output_nanoton_per_mtok=prices,
    fee_bps=st.integers(0, 10_000),
)
tokens = st.integers(0, 2**32 - 1)


def quote(input_: int, cached: int, output: int, fee_bps: int = 500) -> Quote:
    return Quote(
        model_id=MODEL, input_nanoton_per_mtok=input_, cached_input_nanoton_per_mtok=cached,
        output_nanoton_per_mtok=output, fee_bps=fee_bps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "counts", "nanoton"),
    [
        (quote(0, 0, 0), (9, 9, 9, 9), 0),
        (quote(1, 1, 1), (0, 0, 0, 0), 0),
        (quote(1, 0, 0), (1, 0, 0, 0), 1),  # a millionth is rounded up
        (quote(1_000_000, 0, 0), (7, 0, 0, 0), 7),
        (quote(1_000_000, 250_000, 4_000_000), (100, 20, 50, 5), 285),  # 80 + 5 + 200
        (quote(1_000_000, 0, 1_000_000), (10, 10, 1, 1), 1),  # all of the input was cached
        (quote(1, 1, 1), (400_000, 0, 600_000, 0), 1),  # one rounding, not one per part
        (quote(1, 1, 1), (400_000, 0, 600_001, 0), 2),
    ],
)
def test_the_price_follows_from_the_counts(
    terms: Quote, counts: tuple[int, int, int, int], nanoton: int
) -> None:
    assert price(terms, TokenCounts(*counts)) == nanoton


@pytest.mark.parametrize(
    "counts", [(1, 2, 0, 0), (0, 0, 1, 2), (1, -1, 0, 0), (-1, 0, 0, 0), (0, 0, 0, -1)]
)
def test_a_part_larger_than_its_whole_is_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="parts", check=says_why):
        TokenCounts(*counts)


@given(quotes, tokens, tokens, st.data())
def test_no_job_within_its_bounds_costs_more_than_its_greatest_price(
    terms: Quote, max_input: int, max_output: int, data: st.DataObject
) -> None:
    used_input = data.draw(st.integers(0, max_input))
    used_output = data.draw(st.integers(0, max_output))
    counts = TokenCounts(
        used_input, data.draw(st.integers(0, used_input)),
        used_output, data.draw(st.integers(0, used_output)),
    )  # fmt: skip
    assert 0 <= price(terms, counts) <= greatest_price(terms, max_input, max_output)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_a_split_sums_to_the_price_and_favours_nobody_by_a_unit(total: int, fee_bps: int) -> None:
    parts = split(total, fee_bps)
    assert parts.provider + parts.fee == total
    assert min(parts.provider, parts.fee) >= 0
    assert 0 <= parts.fee * 10_000 - total * fee_bps < 10_000


@pytest.mark.parametrize(
    ("total", "fee_bps", "provider", "fee"),
    [(0, 500, 0, 0), (1, 500, 0, 1), (285, 500, 270, 15), (100, 0, 100, 0), (100, 10_000, 0, 100)],
)
def test_the_providers_share_is_floored(total: int, fee_bps: int, provider: int, fee: int) -> None:
    assert (split(total, fee_bps).provider, split(total, fee_bps).fee) == (provider, fee)


def test_a_quote_s_id_is_the_hash_of_its_canonical_bytes_under_their_label() -> None:
    labelled = b"cai/1 quote\0" + QUOTE.to_canonical()
    assert quote_id(QUOTE) == hashlib.sha256(labelled).hexdigest()


@pytest.mark.parametrize("field", [name for name in Quote.model_fields if name != "model_id"])
def test_every_term_of_a_quote_changes_its_id(field: str) -> None:
    changed = QUOTE.model_copy(update={field: getattr(QUOTE, field) + 1})
    assert quote_id(changed) != quote_id(QUOTE)
