"""What waits for one shard's matcher takes no place of another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cocoon.kernel.errors import RateLimited
from services.gateway.admission import Admission
from services.gateway.settings import GatewaySettings


def test_a_matcher_that_does_not_answer_fills_its_own_shards_room_only() -> None:
    settings = GatewaySettings(
        nats_url="nats://127.0.0.1", postgres_dsn_file=Path("dsn"), account_shards=(1, 2),
        max_unmatched_jobs=2,
    )  # fmt: skip
    admission = Admission(settings)
    with (
        admission.enter("key_1") as a, admission.enter("key_1") as b,
        admission.enter("key_2") as c, admission.enter("key_2") as d,
    ):  # fmt: skip
        a.asking(2)
        b.asking(2)
        with pytest.raises(RateLimited):
            c.asking(2)
        c.asking(1)
        assert admission.unmatched == 3
        a.answered()
        a.answered()
        d.asking(2)
    assert admission.unmatched == 0
