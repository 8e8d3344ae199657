"""Lines that are cut off, half dead, late or slow, between services and servers, under load."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.support.chaos_world import Trial, trials
from tests.support.fault_proxy import Direction, FaultProxy
from tests.support.lines_of import LINKS, LinedWorld, Link

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
# longer than a provider may be silent and than a gateway waits for its matcher
PARTED_S = 4.0
ANSWERS = 4
RECOVERY_S = 60.0
LONG_RUN = trials() > 1
PARTITIONS: tuple[Link, ...] = (
    ("gateway", "nats"), ("billing", "postgres"),
)  # fmt: skip
DIED: tuple[tuple[Link, Direction], ...] = ((("matcher", "nats"), "up"),)
if LONG_RUN:
    PARTITIONS = LINKS
    DIED += (
        (("billing", "postgres"), "up"), (("gateway", "nats"), "down"),
        (("matcher", "postgres"), "up"), (("billing", "nats"), "down"),
        (("provider-1", "nats"), "up"),
    )  # fmt: skip


@pytest.mark.parametrize("link", PARTITIONS, ids="-".join)
async def test_a_partition_that_heals_breaks_no_invariant(world: LinedWorld, link: Link) -> None:
    for _ in range(trials()):
        trial = Trial(f"partition for {PARTED_S:.0f} s: {link[0]} and {link[1]}")
        async with world.load() as load:
            await load.answered(ANSWERS, time.monotonic())
            fault_s = time.monotonic()
            world.lines[link].tell(FaultProxy.partition)
            if link == ("gateway", "postgres"):
                # it asks by itself every 5 s only, and keys that it knows for longer
                assert await _status_of_a_job(world) == 503
            await asyncio.sleep(max(0.0, fault_s + PARTED_S - time.monotonic()))
            world.lines[link].tell(FaultProxy.heal)
            trial.at_s = time.monotonic()
            await load.answered(ANSWERS, trial.at_s, RECOVERY_S)
        await world.judge(trial, since_s=fault_s)
        assert trial.violations == []
        assert world.lines[link].tell(lambda proxy: proxy.swallowed) > 0


async def _status_of_a_job(world: LinedWorld) -> int:
    """Of the answer to a question that the gateway reads Postgres for."""
    headers = {"Authorization": f"Bearer {world.network.api_key}"}
    job_id = next(call.job_id for call in world.history if call.job_id)
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        url = f"{world.network.gateway}/v1/jobs/{job_id}"
        return (await client.get(url, headers=headers)).status_code


@pytest.mark.parametrize(("link", "lost"), DIED)
async def test_a_line_that_died_without_a_word_is_left_for_another(
    world: LinedWorld, link: Link, lost: Direction
) -> None:
    for _ in range(trials()):
        trial = Trial(f"half-open: {link[0]} and {link[1]}, {lost} lost")
        async with world.load() as load:
            await load.answered(ANSWERS, time.monotonic())
            trial.at_s = time.monotonic()
            world.lines[link].tell(lambda proxy: proxy.half_open(lost))
            # whoever asks while nobody has noticed may wait: what counts is that it ends by itself
            await load.answered(4 * ANSWERS, trial.at_s, RECOVERY_S)
        await world.judge(trial)
        world.heal()
        assert trial.violations == []


async def test_late_and_slow_lines_cost_time_and_nothing_else(world: LinedWorld) -> None:
    for _ in range(trials()):
        late = Trial("20 to 60 ms late, both ways, all lines", at_s=time.monotonic())
        for line in world.lines.values():
            line.tell(lambda proxy: proxy.delay(0.02, jitter_s=0.04))
        async with world.load() as load:
            await load.answered(4 * ANSWERS, late.at_s, RECOVERY_S)
        world.heal()
        await world.judge(late)
        assert late.violations == []
        assert all(call.message for call in world.failures(late.at_s))

        slow = Trial("a reader of 4 KB/s before the gateway", at_s=time.monotonic())
        world.lines["sidecar", "gateway"].tell(lambda proxy: proxy.slow(4_000, "down"))
        async with world.load() as load:
            await load.answered(2 * ANSWERS, slow.at_s, RECOVERY_S)
        world.heal()
        await world.judge(slow)
        assert slow.violations == []
        assert all(call.message for call in world.failures(slow.at_s))
