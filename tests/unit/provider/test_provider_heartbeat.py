"""A heartbeat offers what the engine has left beside its work for others, and at least one job."""

from __future__ import annotations

from typing import Any

import pytest

from cocoon.contracts import subjects
from cocoon.contracts.messages import Heartbeat
from services.provider.backends.base import EngineLoad
from services.provider.heartbeat import Heart


class Wire:
    """What would go out to NATS."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    async def publish(self, subject: str, body: bytes) -> None:
        self.sent.append((subject, body))


@pytest.mark.parametrize(
    ("total", "own", "told"), [(0, 0, 8), (5, 5, 8), (6, 2, 4), (3, 4, 8), (900, 0, 1)]
)
async def test_what_others_have_of_the_engine_is_not_offered(
    total: int, own: int, told: int
) -> None:
    wire: Any = Wire()
    load = EngineLoad()
    heart = Heart(
        wire, "prov_x", "ab" * 16, lambda: [("cd" * 16, 1)], lambda: False,
        lambda: max(1, 8 - load.elsewhere), interval_s=1.0,
    )  # fmt: skip
    load.told(total, own=own)
    await heart.beat()
    ((subject, body),) = wire.sent
    assert subject == subjects.heartbeat("prov_x")
    assert Heartbeat.model_validate_json(body).concurrency == told
