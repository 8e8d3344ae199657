"""Money is exact integers of nanoTON, in and out of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.kernel.money import MAX_NANOTON, ceil_div, check_nanoton, format_ton, parse_ton


@pytest.mark.parametrize(
    ("text", "nanoton"),
    [
        ("0", 0),
        ("1", 1_000_000_000),
        ("1.5", 1_500_000_000),
        (" 0.25 ", 250_000_000),
        ("0.000000001", 1),
        ("0.100000000", 100_000_000),
        ("9223372036.854775807", MAX_NANOTON),
        ("007", 7_000_000_000),
    ],
)
def test_an_amount_of_ton_is_read_exactly(text: str, nanoton: int) -> None:
    assert parse_ton(text) == nanoton


@pytest.mark.parametrize(
    "text",
    ["", ".", "1.", ".5", "-1", "+1", "1e9", "1,5", "1_000", "0x10", "NaN", "inf", "1.0000000001",
     "1.5.5", "1 5", "٣", "1.٣", "9223372036.854775808", "9" * 5000],
)  # fmt: skip
def test_anything_but_digits_with_nine_decimals_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"TON|integer|digits"):
        parse_ton(text)


@given(st.integers(0, MAX_NANOTON))
def test_what_is_printed_reads_back_as_the_same_amount(amount: int) -> None:
    assert parse_ton(format_ton(amount)) == amount


def test_a_negative_change_prints_with_its_sign() -> None:
    assert format_ton(-1_500_000_000) == "-1.5"


@pytest.mark.parametrize("amount", [-1, MAX_NANOTON + 1, 1.0, True, "1", None])
def test_only_an_integer_within_the_supply_is_an_amount(amount: object) -> None:
    with pytest.raises(ValueError, match="nanoTON"):
        check_nanoton(amount)  # type: ignore[arg-type]


@given(st.integers(0, 10**40), st.integers(1, 10**20))
def test_division_rounds_up_and_by_less_than_one(numerator: int, denominator: int) -> None:
    quotient = ceil_div(numerator, denominator)
    assert 0 <= quotient * denominator - numerator < denominator
