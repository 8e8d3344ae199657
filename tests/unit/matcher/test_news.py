"""A match goes on when its news cannot be told."""

from __future__ import annotations

from nats.aio.client import Client

from cocoon.contracts.messages import MatchUpdate
from services.matcher.main import _news
from tests.support.job_world import hex16


async def test_news_that_the_bus_does_not_take_never_breaks_a_decision() -> None:
    update = MatchUpdate(kind="waiting", job_id=hex16("job"))
    await _news(Client())("gw1", hex16("job"), update, "")  # a closed connection refuses all
