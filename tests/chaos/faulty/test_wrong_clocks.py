"""A provider whose wall clock is wrong: it is refused and told so, or serves; nothing is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.chaos_world import Trial, trials
from tests.support.lines_of import LinedWorld

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
NAME = "provider-2"
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
AT_START = (HOUR_MS, -HOUR_MS, 5 * MINUTE_MS, -5 * MINUTE_MS) if trials() > 1 else (
    HOUR_MS, -HOUR_MS,
)  # fmt: skip


@pytest.mark.parametrize("wrong_by_ms", AT_START)
async def test_an_agent_that_starts_with_a_wrong_clock(world: LinedWorld, wrong_by_ms: int) -> None:
    network, log = world.network, world.network.folder.logs / f"{NAME}.log"
    for _ in range(trials()):
        trial = Trial(f"an agent starts {wrong_by_ms / MINUTE_MS:+.0f} min wrong")
        async with world.load() as load:
            await load.answered(4, time.monotonic())
            old_pid, size = network.pid(NAME), log.stat().st_size
            network.set_clock(NAME, wrong_by_ms)
            trial.at_s = time.monotonic()
            await asyncio.to_thread(network.kill, NAME)
            await asyncio.sleep(4)
            await load.answered(8, trial.at_s)
            print(log.read_text()[size:][-3000:])
            network.set_clock(NAME, 0)
            await asyncio.to_thread(network.wait_restarted, NAME, old_pid, 60)
        await world.judge(trial)

        assert trial.violations == []
