"""A provider that other shards use too: it may say busy, and then the job waits for its turn."""

from __future__ import annotations

import asyncio

import pytest

from cocoon.contracts.events import LeaseExpired
from cocoon.contracts.messages import CancelJob
from services.matcher.memory import Memory
from tests.support.example_events import put
from tests.support.job_world import ALICE, BOB, MODEL, Provider, hex16, job_request
from tests.support.matcher_world import MatcherWorld, ready_world
from tests.support.model_log import ModelLog

GRANTED = ["JobRequested", "FundsHeld", "ProviderMatched"]
AGAIN = [*GRANTED, "LeaseExpired", "ProviderMatched"]
OTHERS = ((hex16("other 1"), 1), (hex16("other 2"), 1))  # another shard's jobs


async def turned_away(*providers: Provider) -> MatcherWorld:
    """A job whose provider, Alice alone if none is named, has been filled by another shard."""
    world = await ready_world(1_000_000, *providers or (ALICE,))
    await world.ask(job_request())
    world.report("job", "busy")
    await world.settle()
    return world


def beat(world: MatcherWorld, *others: tuple[str, int]) -> None:
    world.leases.on_heartbeat(ALICE.beat(*others))


async def test_a_job_whose_provider_is_busy_gets_its_next_epoch_there_once_there_is_room() -> None:
    world = await turned_away()
    beat(world, *OTHERS)
    await world.sweep(0.1)
    assert world.types() == GRANTED
    assert world.heard() == ["matched", "committed"]

    beat(world, OTHERS[0])
    await world.sweep(0.1)

    assert world.types() == AGAIN
    assert world.heard() == ["matched", "committed"] * 2
    assert (world.last().epoch, world.matched_to()) == (2, ALICE)
    expired = world.log.events[-2].decode()
    assert isinstance(expired, LeaseExpired)
    assert (expired.reason, expired.counts) == ("busy", False)
    assert world.memory.providers[ALICE.id].live_jobs == {hex16("job")}


async def test_a_provider_that_said_busy_is_full_until_it_is_heard_again() -> None:
    world = await turned_away()
    await world.ask(job_request("next"))
    assert world.heard("next") == ["waiting"]


async def test_whoever_has_room_takes_the_job_of_a_busy_provider_at_once() -> None:
    world = await turned_away(ALICE, BOB)
    assert world.types() == AGAIN
    assert world.heard() == ["matched", "committed"] * 2


async def test_a_job_that_was_turned_away_comes_before_those_that_wait() -> None:
    world = await turned_away()
    await world.ask(job_request("next"))
    beat(world, OTHERS[0])
    await world.sweep(0.1)
    assert world.types() == AGAIN
    assert world.heard("next") == ["waiting"]


async def test_a_job_that_finds_no_room_in_time_fails_without_a_charge() -> None:
    world = await turned_away()
    for _ in range(9):
        beat(world, *OTHERS)
        await world.sweep(1.0)
    assert world.types() == GRANTED
    beat(world, *OTHERS)
    await world.sweep(1.1)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]
    assert world.last().error is not None
    assert (world.last().error.status, world.last().error.code) == (429, "providers_busy")  # type: ignore[union-attr]
    assert world.memory.available_nanoton("acct_1") == 1_000_000
    assert (world.leases.live, world.memory.providers[ALICE.id].live_jobs) == ({}, set())


async def test_the_time_to_wait_is_one_for_all_epochs_of_a_job() -> None:
    world = await turned_away()
    for epoch in range(2, 11):
        beat(world)
        await world.sweep(1.0)
        assert world.last().epoch == epoch
        world.report("job", "busy", epoch=epoch)
        await world.settle()
    beat(world)
    await world.sweep(1.1)
    assert world.types()[-1] == "JobFailed"


async def test_a_job_whose_providers_are_not_heard_any_more_waits_no_longer() -> None:
    world = await turned_away()
    beat(world, *OTHERS)
    await world.sweep(2.9)
    assert world.types() == GRANTED
    await world.sweep(0.2)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]


async def test_many_jobs_that_wait_for_one_full_provider_cost_one_look_a_sweep() -> None:
    world = await ready_world(1_000_000, ALICE)
    for job in ("a", "b"):
        await world.ask(job_request(job))
    for job in ("a", "b"):
        world.report(job, "busy")
    await world.settle()
    beat(world, *OTHERS)
    drawn = world.randomness.count
    await world.sweep(0.1)
    assert world.randomness.count == drawn  # no decision was tried
    assert world.types("a") == world.types("b") == GRANTED
    beat(world)
    await world.sweep(0.1)
    assert world.types("a") == world.types("b") == AGAIN


async def test_a_cancelled_job_does_not_wait_for_room() -> None:
    world = await turned_away()
    world.leases.on_cancel(CancelJob(job_id=hex16("job"), epoch=1))
    await world.sweep(0.1)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobCancelled"]
    assert world.memory.providers[ALICE.id].live_jobs == set()


async def test_a_busy_that_comes_before_the_commit_leaves_no_place_taken() -> None:
    world = await ready_world(1_000_000, ALICE)
    world.appender.hold()
    asking = asyncio.create_task(world.ask(job_request()))
    await world.settle()
    world.report("job", "busy")
    world.appender.release()
    await asking
    await world.settle()
    beat(world, OTHERS[0])  # one place is free, and the job itself must not fill it
    await world.sweep(0.1)
    assert world.types() == AGAIN


async def test_jobs_turned_away_before_their_commit_do_not_keep_each_other_out() -> None:
    world = await ready_world(1_000_000, ALICE)
    world.appender.hold()
    asking = [asyncio.create_task(world.ask(job_request(job))) for job in ("a", "b")]
    await world.settle()
    for job in ("a", "b"):
        world.report(job, "busy")
    world.appender.release()
    await asyncio.gather(*asking)
    await world.settle()
    beat(world, OTHERS[0])  # one place is free: one of the two gets it
    for _ in range(2):
        await world.sweep(0.1)
    assert sorted([world.types("a"), world.types("b")], key=len) == [GRANTED, AGAIN]


async def test_after_a_restart_a_job_that_waited_ends_with_its_lease() -> None:
    world = await turned_away()
    await world.restart()
    for _ in range(11):
        beat(world, *OTHERS)
        await world.sweep(1.0)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]


# ---- parts ----


def shared(sharers: int, mine: int, beats: list[int]) -> int:
    """How many jobs Alice, who takes two, is taken to run after these heartbeats."""
    memory = Memory(500, 3.0, sharers)
    log = ModelLog(0)
    put(log, f"provider/{ALICE.id}", ALICE.network_events())
    for stored in log.events:
        memory.apply_network(stored)
    for count in beats:
        memory.heartbeat(ALICE.beat(*((hex16(f"x{n}"), 1) for n in range(count))), 100.0)
    memory.providers[ALICE.id].live_jobs |= {hex16(f"mine {n}") for n in range(mine)}
    return memory.candidates([ALICE.key_id], MODEL, 100.0)[0].running


@pytest.mark.parametrize(
    ("sharers", "mine", "beats", "running"),
    [
        (1, 1, [2, 0], 1),  # nobody else sends jobs there: what it ran before says nothing
        (2, 0, [2, 1], 1),  # below its part: as the last heartbeat showed
        (2, 1, [2, 0], 2),  # at its part: a place that was free once is left to the other shard
        (2, 1, [0, 0], 1),  # free twice: nobody else wants it
        (2, 1, [0, 1], 2),  # the other shard has taken it
        (3, 0, [2, 1], 2),  # more shards than places: each takes what was free twice
        (3, 0, [1, 1], 1),
    ],
)
def test_a_shard_fills_its_part_at_once_and_borrows_what_nobody_wanted(
    sharers: int, mine: int, beats: list[int], running: int
) -> None:
    assert shared(sharers, mine, beats) == running
