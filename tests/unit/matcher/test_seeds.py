"""The matcher draws from a secret that the log had a commitment to before, and reveals it later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocoon.contracts.commands import ExpireLease, RequestJob, decode_command
from cocoon.contracts.events import MatchingSeedCommitted, MatchingSeedRevealed
from cocoon.domain.seeding import commitment, seed_of
from cocoon.kernel.errors import Unavailable
from services.billing.draws import Draws
from tests.support.example_events import put
from tests.support.job_world import ALICE, BOB, CAROL, PROVIDERS, hex16, job_request
from tests.support.matcher_world import SETTINGS, MatcherWorld, ready_world

STREAM = "matching/1"
PERIOD_S, REVEALED_AFTER_S = SETTINGS.seed_period_s, SETTINGS.seed_revealed_after_s


def commands(world: MatcherWorld) -> list[RequestJob | ExpireLease]:
    found = [
        decode_command(stored.data) for stored in world.log.commands.values()
        if stored.data != b"{}"
    ]  # fmt: skip
    return [one for one in found if isinstance(one, RequestJob | ExpireLease)]


def told(world: MatcherWorld) -> list[MatchingSeedCommitted | MatchingSeedRevealed]:
    return [row.decode() for row in world.log.stream(STREAM)]  # type: ignore[misc]


async def pass_time(world: MatcherWorld, seconds: float) -> None:
    world.clock.passed_s += seconds
    await world.seeds.tick()
    world.tail()


async def test_the_secret_is_committed_to_before_the_first_decision_and_kept() -> None:
    world = await ready_world()
    (committed,) = told(world)
    (secret,) = world.secrets.kept
    assert committed == MatchingSeedCommitted(shard=1, period=1, commitment=commitment(secret))
    await world.ask(job_request())
    (command,) = commands(world)
    assert command.seed == seed_of(secret, command.job_id, 1)
    assert command.seed_period == 1
    assert secret.hex() not in str([row.data for row in world.log.events])


async def test_the_seed_of_a_second_match_has_its_own_epoch() -> None:
    world = await ready_world()
    await world.ask(job_request())
    first = world.matched_to()
    await world.sweep(4.0, *(p for p in (ALICE, BOB, CAROL) if p is not first))
    expire = next(one for one in commands(world) if isinstance(one, ExpireLease))
    assert expire.seed == seed_of(world.secrets.kept[0], hex16("job"), 2)


async def test_a_period_ends_in_time_and_its_secret_is_revealed_a_while_later() -> None:
    world = await ready_world()
    (first,) = world.secrets.kept
    await pass_time(world, PERIOD_S - 1)
    assert len(told(world)) == 1
    await pass_time(world, 1)
    assert [one.period for one in told(world)] == [1, 2]
    assert world.seeds.draw(hex16("job"), 1)[1] == 2
    await pass_time(world, REVEALED_AFTER_S - 1)
    assert len(told(world)) == 2
    await pass_time(world, 1)
    assert told(world)[-1] == MatchingSeedRevealed(shard=1, period=1, secret=first.hex())
    assert first not in world.secrets.kept
    await pass_time(world, 1)
    assert len(told(world)) == 3


async def test_every_stored_seed_passes_the_audit_once_revealed() -> None:
    world = MatcherWorld(settings=SETTINGS.model_copy(update={"seed_period_s": 10.0}))
    await world.start()
    world.fund()
    world.enrol()
    await world.ask(*(job_request(f"job-{n}") for n in range(4)))
    await pass_time(world, 10)
    for provider in PROVIDERS:
        world.beat(provider)
    await world.ask(job_request("late"))
    await pass_time(world, REVEALED_AFTER_S)
    draws = Draws(world.log.stream(STREAM))
    for stored in world.log.commands.values():
        if b'"RequestJob"' in stored.data:
            command = decode_command(stored.data)
            assert isinstance(command, RequestJob)
            assert draws.check(command, stored.first_position) is None
    assert draws.checked == 4
    assert draws.notes() == ["seeds of a secret that is not revealed yet: 1"]


async def test_a_restarted_matcher_goes_on_with_its_secret() -> None:
    world = await ready_world()
    before = world.seeds.draw(hex16("job"), 1)
    await world.restart()
    assert world.seeds.draw(hex16("job"), 1) == before
    assert len(told(world)) == 1


async def test_a_restart_does_not_lengthen_a_period() -> None:
    world = await ready_world()
    world.clock.passed_s += PERIOD_S
    await world.restart()
    assert [one.period for one in told(world)] == [1, 2]


async def test_a_lost_secret_is_followed_by_another_and_said_to_be_lost() -> None:
    world = await ready_world()
    world.secrets.kept.clear()
    await world.restart()
    assert [one.period for one in told(world)] == [1, 2]
    await world.ask(job_request())
    assert world.heard() == ["matched", "committed"]
    await pass_time(world, REVEALED_AFTER_S)
    assert told(world)[-1] == MatchingSeedRevealed(shard=1, period=1, secret=None)


async def test_a_secret_that_was_never_committed_to_is_forgotten() -> None:
    world = await ready_world()
    world.secrets.kept.append(b"\x07" * 32)
    await world.restart()
    assert len(world.secrets.kept) == 1


async def test_nothing_is_decided_before_the_log_has_the_commitment() -> None:
    world = MatcherWorld()
    await world.start()
    world.fund()
    world.enrol()
    unsure = replace(world.memory.seeds, open=(), last=0)
    world.memory.seeds = unsure
    world.seeds._current = None
    await world.ask(job_request())
    assert world.heard() == ["refused"]
    assert world.types() == []


async def test_a_commitment_whose_append_failed_is_made_again_with_the_same_secret() -> None:
    world = await ready_world()
    world.clock.passed_s += PERIOD_S
    world.appender.fail(Unavailable("the log is away"))
    with pytest.raises(Unavailable):
        await world.seeds.tick()
    kept = list(world.secrets.kept)
    assert world.seeds.draw(hex16("job"), 1)[1] == 1  # the former goes on meanwhile
    world.appender.lose_answer()
    await world.seeds.tick()
    assert world.secrets.kept == kept
    assert [one.period for one in told(world)] == [1, 2]


async def test_a_commitment_that_only_the_tail_brought_gives_its_secret_to_one_period() -> None:
    world = await ready_world()
    world.clock.passed_s += PERIOD_S
    world.appender.fail(Unavailable("whether the log has it is not known"))
    with pytest.raises(Unavailable):
        await world.seeds.tick()
    secret = world.secrets.kept[-1]
    committed = MatchingSeedCommitted(shard=1, period=2, commitment=commitment(secret))
    put(world.log, STREAM, [committed])  # it has
    world.tail()
    await pass_time(world, 1)
    assert told(world)[1:] == [committed]
    await pass_time(world, PERIOD_S)
    latest = [one for one in told(world) if isinstance(one, MatchingSeedCommitted)][-1]
    assert (latest.period, latest.commitment != committed.commitment) == (3, True)
