"""Messages that come twice, late and out of their order: on every subject, with real keys."""

from __future__ import annotations

import time

import pytest

from tests.support.chaos_world import Trial, trials
from tests.support.echoes import echoes, relay_again, submit_again
from tests.support.lines_of import LinedWorld

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
PROVIDERS = ("provider-1", "provider-2")


async def test_what_is_said_twice_and_out_of_order_changes_nothing(world: LinedWorld) -> None:
    for _ in range(trials()):
        trial = Trial("every message twice more, up to 0.6 s late", at_s=time.monotonic())
        async with echoes(world.network, PROVIDERS) as said, world.load() as load:
            await load.answered(24, trial.at_s)
        await world.judge(trial)

        assert trial.violations == []
        assert all(call.message for call in world.failures(trial.at_s))
        assert set(said.said) == {"match", "frame", "dispatch", "ack", "heartbeat"}


async def test_results_and_events_that_come_again_are_counted_once(world: LinedWorld) -> None:
    for _ in range(trials()):
        before = await world.evidence()
        trial = Trial("old results and events again, newest first", at_s=time.monotonic())
        async with world.load() as load:
            results = await submit_again(world.network, before, PROVIDERS)
            events = await relay_again(world.network, before, 40)
            await load.answered(8, trial.at_s)
        await world.judge(trial)

        assert trial.violations == []
        assert all(call.message for call in world.failures(trial.at_s))
        assert results > 0
        assert events > 0
