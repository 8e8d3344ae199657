"""The published rule that canaries are judged by, in integers so that every decision replays.

Shares are parts per million, log-likelihoods micro-nats. domain/honesty.py makes one.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cocoon.contracts.base import Contract, Count

Share = Annotated[int, Field(ge=1, le=999_999)]  # parts per million


class HonestyRule(Contract):
    """A sequential test of one provider's canaries. A differing canary adds `differ_unats` to the
    score, a passing one takes `pass_unats` from it.
    """

    tolerance_bps: Annotated[int, Field(ge=0, le=10_000)]  # a distance up to it passes
    honest_ppm: Share  # how many canaries of an honest provider may differ
    cheating_ppm: Share  # how many of one differ that must be found
    false_alarm_ppm: Share  # of honest providers, a test
    miss_ppm: Share  # of providers that cheat so, a test
    differ_unats: Count
    pass_unats: Count
    dishonest_at_unats: Count  # a score of at least this
    honest_at_unats: Count  # a score of at most minus this
