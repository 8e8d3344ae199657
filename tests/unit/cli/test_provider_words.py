"""What `provider status` and `provider run` say of an agent: never that jobs come when none can."""

from __future__ import annotations

from typing import Any

import pytest

from cocoon.cli.provider_run import changes
from cocoon.cli.provider_status import lines

NONE_KNOWN = {"unavailable": "the bus does not answer"}


def agent(**changes: Any) -> dict[str, Any]:
    model = {
        "name": "skills-1", "enabled": True, "warm": True, "healthy": True, "running": 0,
        "waiting": 0, "concurrency": 16, "jobs": 0, "tokens_per_s": 0,
        "price": {"input": 20_000_000, "cached_input": 10_000_000, "output": 80_000_000},
    }  # fmt: skip
    return {
        "provider_id": "prov_1", "tier": "simulated", "draining": False, "models": [model],
        "bus": {"connected": True, "url": "nats://127.0.0.1:1"},
        "standing": {"attested": True, "evidence_valid_until_ms": 1_790_000_000_000},
        **changes,
    }  # fmt: skip


def ill() -> list[dict[str, Any]]:
    return [{**agent()["models"][0], "healthy": False}]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "taking jobs"),
        ({"draining": True}, "DRAINING"),
        ({"bus": {"connected": False, "url": None}}, "NO JOBS: the bus is away"),
        ({"models": ill()}, "NO JOBS: no model can serve"),
    ],
)
def test_the_status_begins_with_whether_jobs_can_come(changed: dict[str, Any], said: str) -> None:
    assert lines(agent(**changed), NONE_KNOWN)[0].endswith(f"   {said}")


def test_a_bus_that_is_away_has_a_next_step() -> None:
    shown = lines(agent(bus={"connected": False, "url": None}), NONE_KNOWN)
    assert "./cocoon provider doctor" in shown[1]


def test_a_first_look_tells_prices_in_ton_and_no_attestation_where_there_is_none() -> None:
    attested, opened = (list(changes({}, agent(tier=tier))) for tier in ("attested", "open"))
    assert attested[1].startswith("attested until ")
    assert opened[1].startswith("in the open tier until ")
    assert opened[2] == "skills-1 takes jobs, 0.08 TON per million tokens of the answer"
