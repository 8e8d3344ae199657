"""What others have of the engines' servers is one figure for the agent: the sum over its models."""

from __future__ import annotations

import re

from cocoon.telemetry.metrics import render
from services.provider.backends.base import EngineLoad


def told() -> float:
    found = re.search(rb"^cocoon_engine_elsewhere (\S+)$", render(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_the_gauge_is_the_sum_of_all_models_and_a_closed_engine_adds_nothing() -> None:
    before = told()
    one, other = EngineLoad(), EngineLoad()
    one.told(5, own=2)
    other.told(9, own=1)
    assert told() - before == 3 + 8
    one.told(2, own=2)
    assert told() - before == 8
    other.closed()
    other.closed()
    assert told() == before
    assert (one.elsewhere, other.elsewhere) == (0, 0)
