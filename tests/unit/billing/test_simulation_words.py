"""How long a time a simulation looked at, in words."""

from __future__ import annotations

import pytest

from services.billing.simulating import span_text


@pytest.mark.parametrize(
    ("span_ms", "text"),
    [
        (0, "1 s"), (1_500, "1 s"), (2_000, "2 seconds"), (119_999, "120 seconds"),
        (120_000, "2 minutes"), (7_199_000, "120 minutes"), (7_200_000, "2 hours"),
        (86_400_000, "24 hours"),
    ],
)  # fmt: skip
def test_a_span_is_told_in_the_unit_that_fits(span_ms: int, text: str) -> None:
    assert span_text(span_ms) == text
