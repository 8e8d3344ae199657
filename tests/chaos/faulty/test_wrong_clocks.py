"""A provider whose wall clock is wrong: refused and told why, or it serves; nothing is lost."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from tests.support.chaos_world import Trial, trials
from tests.support.lines_of import LinedWorld

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
NAME = "provider-2"
MINUTES = (60, -60, 5, -5) if trials() > 1 else (60,)
STEPS_MINUTES = (10, -10) if trials() > 1 else (10,)
_CODE = re.compile(r'"code": "([a-z_]+)"')


@pytest.mark.parametrize("minutes", MINUTES)
async def test_an_agent_that_starts_with_a_wrong_clock_is_told_and_costs_nobody(
    world: LinedWorld, minutes: int
) -> None:
    network = world.network
    log = network.folder.logs / f"{NAME}.log"
    for _ in range(trials()):
        trial = Trial(f"an agent starts with its clock {minutes:+d} min wrong")
        async with world.load() as load:
            await load.answered(4, time.monotonic())
            old_pid, size = network.pid(NAME), log.stat().st_size
            trial.at_s = time.monotonic()
            await asyncio.to_thread(network.kill, NAME)
            network.set_clock(NAME, minutes * 60_000)  # long before the next one looks at it

            def has_begun(size: int = size, old_pid: int = old_pid) -> bool:
                return bool(told(log, size)) or network.pid(NAME) != old_pid

            await load.until(has_begun, "its start", 40)
            said = told(log, size)
            await load.answered(8, trial.at_s)
            network.set_clock(NAME, 0)
            await asyncio.to_thread(network.wait_restarted, NAME, old_pid, 60)
            trial.restarted_s = time.monotonic() - trial.at_s
            await load.answered(4, time.monotonic())
        await world.judge(trial)

        print(f"{minutes:+d} min: {said or 'it serves'}")
        assert trial.violations == []
        if abs(minutes) == 60:
            assert said, "an hour is more than anybody's patience"


def told(log: Path, size: int) -> list[str]:
    """The codes of what an agent was refused for, since its log had this size."""
    with log.open("rb") as file:
        file.seek(size)
        return _CODE.findall(file.read().decode(errors="replace"))


@pytest.mark.parametrize("minutes", STEPS_MINUTES)
async def test_a_clock_that_steps_while_jobs_run_loses_none(
    world: LinedWorld, minutes: int
) -> None:
    network = world.network
    for _ in range(trials()):
        trial = Trial(f"two agents' clocks step by {minutes:+d} min and back", time.monotonic())
        async with world.load() as load:
            await load.answered(4, trial.at_s)
            for wrong_by_ms in (minutes * 60_000, 0):
                for name in ("provider-1", NAME):
                    network.set_clock(name, wrong_by_ms)
                await asyncio.sleep(2)
            await load.answered(8, time.monotonic())
        await world.judge(trial)

        assert trial.violations == []
