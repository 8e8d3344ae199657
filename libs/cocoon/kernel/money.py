"""Money is integers of nanoTON (1 TON = 10**9). No floats enter this module or leave it."""

from __future__ import annotations

NANOTON_PER_TON = 1_000_000_000
MAX_NANOTON = 2**63 - 1  # a signed 64-bit column holds the whole supply (5.1 * 10**18)
BASIS_POINTS = 10_000


def check_nanoton(amount: int) -> int:
    """Return the amount unchanged. Raises ValueError unless it is an int in 0..2**63-1."""
    if type(amount) is not int or not 0 <= amount <= MAX_NANOTON:
        raise ValueError("an amount is an integer of nanoTON between 0 and 2**63-1")
    return amount


def parse_ton(text: str) -> int:
    """Parse a decimal TON amount such as "1.5" into nanoTON, exactly.

    Raises ValueError for anything but digits with at most nine decimals, and beyond MAX_NANOTON.
    """
    whole, dot, frac = text.strip().partition(".")
    if (
        not whole.isascii()
        or not whole.isdigit()
        or (dot and not (frac.isascii() and frac.isdigit()))
    ):
        raise ValueError(f"{text!r} is not an amount of TON; write it like 1 or 0.25")
    if len(frac) > 9:
        raise ValueError("TON has nine decimals; write fewer digits after the point")
    digits = whole.lstrip("0") or "0"
    amount = int(digits[:20]) * NANOTON_PER_TON + int(frac.ljust(9, "0"))
    if len(digits) > 20 or amount > MAX_NANOTON:
        raise ValueError(f"an amount is at most {format_ton(MAX_NANOTON)} TON")
    return amount


def format_ton(amount_nanoton: int) -> str:
    """Render nanoTON as TON without a rounding: 1500000000 -> "1.5"."""
    sign = "-" if amount_nanoton < 0 else ""
    whole, frac = divmod(abs(amount_nanoton), NANOTON_PER_TON)
    return f"{sign}{whole}" + (f".{frac:09d}".rstrip("0") if frac else "")


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division rounded up, for non-negative numerators."""
    return -(-numerator // denominator)
