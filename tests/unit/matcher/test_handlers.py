"""Gateways ask, the matcher holds, matches, commits and answers: through its public doors."""

from __future__ import annotations

import asyncio

import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import AccountOpened, FundsHeld, FundsRefused, ProviderMatched
from cocoon.contracts.messages import CancelJob
from cocoon.domain.job import fold
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import Unavailable
from services.matcher import handlers
from services.matcher.accepted import AcceptedCommands
from tests.support.example_events import put
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    NOW_MS,
    PROVIDERS,
    Provider,
    hex16,
    job_request,
    settle_command,
)  # fmt: skip
from tests.support.matcher_world import MatcherWorld, ready_world

GRANTED = ["JobRequested", "FundsHeld", "ProviderMatched"]


async def test_a_match_is_announced_first_and_committed_after_the_append() -> None:
    world = await ready_world()
    world.appender.hold()
    asking = asyncio.create_task(world.ask(job_request()))
    await world.settle()
    assert world.heard() == ["matched"]
    assert world.log.stream(f"job/{hex16('job')}") == []
    world.appender.release()
    await asking
    assert world.heard() == ["matched", "committed"]
    assert world.types() == GRANTED
    assert world.last().position == world.log.events[-1].position


async def test_the_announcement_names_provider_key_quote_and_lease() -> None:
    world = await ready_world(1_000_000, ALICE)
    await world.ask(job_request())
    told, match = world.updates[0], world.log.events[-1].decode()
    assert isinstance(match, ProviderMatched)
    assert (told.provider_id, told.key_id, told.epoch) == (ALICE.id, ALICE.key_id, 1)
    assert (told.quote, told.quote_id, told.evidence_id) == (
        match.quote, match.quote_id, match.evidence_id,
    )  # fmt: skip


async def test_the_same_command_again_names_the_job_and_writes_nothing() -> None:
    world = await ready_world()
    await world.ask(job_request())
    rows = len(world.log.events)
    await world.ask(job_request())
    assert world.last().kind == "existing"
    assert world.last().req_hash == job_request().req_hash
    assert len(world.log.events) == rows


async def test_a_repeat_while_the_first_is_decided_gets_no_second_answer() -> None:
    world = await ready_world()
    await world.ask(job_request(), job_request(), job_request())
    assert world.heard() == ["matched", "committed"]


async def test_the_same_key_with_another_envelope_is_told_of_the_first_job() -> None:
    world = await ready_world()
    first = job_request("first", command_id="one-key")
    await world.ask(first)
    await world.ask(job_request("second", command_id="one-key"))
    told = world.last("second") if world.heard("second") else world.last("first")
    assert (told.kind, told.job_id, told.req_hash) == ("existing", hex16("first"), first.req_hash)
    assert world.types("second") == []


async def test_a_job_id_of_another_command_is_refused() -> None:
    world = await ready_world()
    await world.ask(job_request())
    await world.ask(job_request(command_id="another"))
    assert world.last().kind == "refused"
    assert world.last().error is not None
    assert (world.last().error.status, world.last().error.code) == (409, "job_id_used")  # type: ignore[union-attr]


async def test_a_job_id_that_another_command_is_deciding_keeps_its_hold_and_its_lease() -> None:
    world = await ready_world(25_000)  # for both
    world.appender.hold()
    first, second = job_request(), job_request(command_id="another", gateway_id="gw2")
    asking = asyncio.create_task(world.ask(first, second))
    await world.settle()
    assert world.memory.available_nanoton("acct_1") == 15_000
    world.appender.release()
    await asking
    assert sorted(world.heard()) == ["committed", "matched", "refused"]
    assert world.types() == GRANTED
    assert hex16("job") in world.leases.live
    assert world.memory.available_nanoton("acct_1") == 15_000


def settle(world: MatcherWorld, job: str) -> None:
    """Billing pays the job, and the tail brings it."""
    state = fold(stored.decode() for stored in world.log.stream(f"job/{hex16(job)}"))
    put(world.log, f"job/{hex16(job)}", decide_settle_result(state, settle_command(state)))
    world.tail()


@pytest.mark.parametrize("passed_s", [0, 10, 3600], ids=["at once", "nobody there", "too late"])
@pytest.mark.parametrize("providers", [(), (ALICE,)], ids=["three", "one, matched as before"])
async def test_a_command_that_was_forgotten_is_still_the_same_job(
    providers: tuple[Provider, ...], passed_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "REMEMBERED_COMMANDS", 1)
    world = await ready_world(1_000_000, *providers)
    for job in ("job", "later1", "later2", "later3"):
        await world.ask(job_request(job))
        settle(world, job)
    rows, free = len(world.log.events), world.memory.available_nanoton("acct_1")
    world.clock.passed_s += passed_s
    await world.ask(job_request())
    assert world.last().kind == "existing"
    assert (len(world.log.events), world.memory.available_nanoton("acct_1")) == (rows, free)
    assert not world.leases.live


async def test_a_request_that_the_log_has_not_is_refused_when_it_comes_too_late() -> None:
    world = await ready_world()
    world.clock.passed_s += 3600
    await world.ask(job_request())
    assert world.heard() == ["refused"]


def test_running_jobs_commands_stay_however_many_follow() -> None:
    running = {"job 0", "job 7"}
    accepted = AcceptedCommands(running, limit=4)
    for number in range(100):
        accepted.add(f"command {number}", f"job {number}")
        assert len(accepted) <= 2 * 4 + len(running)
    assert [accepted.get(f"command {n}") for n in (0, 7, 8)] == ["job 0", "job 7", None]
    assert all(accepted.get(f"command {n}") == f"job {n}" for n in range(96, 100))
    running.clear()
    for number in range(100, 108):
        accepted.add(f"command {number}", f"job {number}")
    assert accepted.get("command 0") is None


async def test_a_repeat_to_a_restarted_matcher_is_still_the_same_job() -> None:
    world = await ready_world()
    await world.ask(job_request())
    await world.restart()
    await world.ask(job_request())
    assert world.last().kind == "existing"
    assert world.types() == GRANTED


async def test_insufficient_funds_are_written_and_told_with_both_numbers() -> None:
    world = await ready_world(9_999)
    await world.ask(job_request())
    assert world.types() == ["JobRequested", "FundsRefused"]
    refused = world.last()
    assert refused.kind == "refused"
    assert refused.error is not None
    assert (refused.error.status, refused.error.code) == (402, "insufficient_funds")
    assert "0.00001 TON" in refused.error.message
    assert "the account acct_1 has 0.000009999 TON" in refused.error.message
    assert "`./cocoon fund acct_1 1`" in refused.error.message
    assert world.memory.pending_holds == {}


async def test_an_unknown_account_is_told_to_fund_and_writes_nothing() -> None:
    world = await ready_world()
    await world.ask(job_request(account="acct_unknown"))
    assert world.last().error is not None
    assert world.last().error.code == "insufficient_funds"  # type: ignore[union-attr]
    assert "./cocoon fund acct_unknown 1" in world.last().error.message  # type: ignore[union-attr]
    assert world.types() == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"recipient_key_ids": (hex16("nobody"),)}, "no_provider_recipient"),
        ({"max_price_nanoton": 1}, "no_provider_price"),
        ({"max_input_tokens": 10_000}, "no_provider_context"),
        ({"not_after_ms": NOW_MS}, "expired"),
    ],
)
async def test_a_job_that_nobody_can_take_is_refused_by_its_reason_and_not_written(
    changes: dict[str, object], code: str
) -> None:
    world = await ready_world()
    await world.ask(job_request(**changes))
    assert world.heard() == ["refused"]
    assert world.last().error is not None
    assert world.last().error.code == code  # type: ignore[union-attr]
    assert world.log.stream(f"job/{hex16('job')}") == []


# ---- money under concurrency ----


async def test_pending_holds_never_overspend_under_concurrency() -> None:
    wide = tuple(Provider(p.name, concurrency=100) for p in PROVIDERS)
    world = await ready_world(35_000, *wide)
    world.appender.hold()
    requests = [job_request(f"job{index}") for index in range(10)]
    asking = asyncio.create_task(world.ask(*requests))
    await world.settle()
    world.appender.release()
    await asking
    ends = [world.types(f"job{index}")[-1] for index in range(10)]
    assert sorted(ends) == ["FundsRefused"] * 7 + ["ProviderMatched"] * 3
    held = [e.decode() for e in world.log.events if e.type == "FundsHeld"]
    assert sum(h.amount_nanoton for h in held if isinstance(h, FundsHeld)) <= 35_000
    assert world.memory.pending_holds == {}
    assert world.memory.available_nanoton("acct_1") == 5_000


async def test_a_withdrawal_on_its_way_falsifies_a_hold_and_the_decision_is_made_again() -> None:
    world = await ready_world()
    world.appender.hold()
    asking = asyncio.create_task(world.ask(job_request()))
    await world.settle()
    world.log.append(  # the account's stream grows before the hold is committed
        AppendItem("w", b"{}", "billing", "acct_1", (),
                   (NewEvent("account/acct_1", AccountOpened(account_id="acct_1")),))
    )  # fmt: skip
    world.appender.release()
    world.tail()
    await asking
    assert world.types() == GRANTED
    assert world.heard() == ["matched", "committed"]
    assert world.matched_to().id == world.log.events[-1].decode().provider_id  # type: ignore[attr-defined]


async def test_an_account_that_never_comes_to_rest_is_refused_and_keeps_no_hold() -> None:
    world = await ready_world()
    world.memory.accounts["acct_1"].version = 99  # as if the tail had lost its way
    await world.ask(job_request())
    assert world.heard() == ["matched", "refused"]
    assert world.memory.pending_holds == {}
    assert world.leases.live == {}
    assert world.memory.available_nanoton("acct_1") == 1_000_000


async def test_after_a_conflict_the_match_stays_with_the_provider_that_was_announced() -> None:
    for index in range(6):
        world = await ready_world()
        world.randomness.count = index  # other draws, other providers
        job = f"job{index}"
        world.appender.hold()
        asking = asyncio.create_task(world.ask(job_request(job)))
        await world.settle()
        announced = world.matched_to(job)
        world.log.append(
            AppendItem("w", b"{}", "billing", "acct_1", (),
                       (NewEvent("account/acct_1", AccountOpened(account_id="acct_1")),))
        )  # fmt: skip
        world.tail()
        world.appender.release()
        await asking
        committed = world.log.events[-1].decode()
        assert isinstance(committed, ProviderMatched)
        assert committed.provider_id == announced.id
        assert world.heard(job).count("matched") == 1


async def test_an_append_that_fails_takes_the_match_back() -> None:
    world = await ready_world()
    world.appender.fail(Unavailable("the log's queue is full; try again shortly"))
    await world.ask(job_request())
    assert world.heard() == ["matched", "refused"]
    assert world.last().error is not None
    assert world.last().error.status == 503  # type: ignore[union-attr]
    assert (world.leases.live, world.memory.pending_holds) == ({}, {})
    assert all(not view.live_jobs for view in world.memory.providers.values())
    await world.ask(job_request())
    assert world.types() == GRANTED


async def test_an_append_whose_answer_was_lost_is_one_job() -> None:
    world = await ready_world()
    world.appender.lose_answer()
    await world.ask(job_request())
    assert world.heard() == ["matched", "committed"]
    assert world.types() == GRANTED


async def test_a_zombie_stops_and_says_nothing_more() -> None:
    world = await ready_world()
    world.log.acquire_term("matcher")  # somebody else owns the shard now
    await world.ask(job_request())
    assert [error.code for error in world.stopped] == ["stale_term"]
    assert world.heard() == ["matched"]
    assert world.types() == []


# ---- the waiting room ----


async def full_world() -> MatcherWorld:
    """Alice alone, with both of her places taken."""
    world = await ready_world(1_000_000, ALICE)
    await world.ask(job_request("one"), job_request("two"))
    return world


async def test_when_all_are_busy_the_request_waits_and_is_told_so_once() -> None:
    world = await full_world()
    await world.ask(job_request())
    await world.ask(job_request())
    assert set(world.heard()) == {"waiting"}
    assert len(world.matcher.waiting) == 1
    await world.sweep(0.1, ALICE)
    assert world.heard()[-1] == "waiting"
    assert world.types() == []


async def end(world: MatcherWorld, job: str) -> None:
    world.report(job, "refused", "bad_request")
    await world.settle()


async def test_a_waiting_request_is_matched_when_a_place_is_free() -> None:
    world = await full_world()
    await world.ask(job_request())
    await end(world, "one")
    await world.sweep(0.1, ALICE)
    assert world.heard() == ["waiting", "matched", "committed"]
    assert len(world.matcher.waiting) == 0


async def test_places_go_to_the_accounts_in_turn() -> None:
    world = await full_world()
    world.fund("acct_2")
    for name in ("a1", "a2", "a3"):
        await world.ask(job_request(name))
    await world.ask(job_request("b1", account="acct_2"))
    order = []
    for _ in range(4):
        running = next(iter(world.memory.providers[ALICE.id].live_jobs))
        world.leases.end(running, world.leases.live[running], "gone", may_rematch=False)
        await world.settle()
        await world.sweep(0.1, ALICE)
        order.append(world.updates[-1].job_id)
    assert order == [hex16(name) for name in ("a1", "b1", "a2", "a3")]


async def test_who_waits_too_long_is_refused_with_retry_after() -> None:
    world = await full_world()
    await world.ask(job_request())
    await world.sweep(9.9, ALICE)
    assert world.heard() == ["waiting"]
    await world.sweep(0.2, ALICE)
    assert world.heard() == ["waiting", "refused"]
    assert world.last().error is not None
    assert (world.last().error.status, world.last().error.retry_after_s) == (429, 1)  # type: ignore[union-attr]


async def test_nobody_waits_past_the_sealed_requests_own_end() -> None:
    world = await full_world()
    await world.ask(job_request(not_after_ms=NOW_MS + 2000))
    await world.sweep(2.1, ALICE)
    assert world.heard() == ["waiting", "refused"]


async def test_a_full_waiting_room_refuses_at_once() -> None:
    world = await full_world()
    await world.ask(*(job_request(f"w{index}") for index in range(5)))
    kinds = [world.heard(f"w{index}") for index in range(5)]
    assert sorted(kinds) == [["refused"], *[["waiting"]] * 4]


async def test_a_cancelled_request_waits_no_more() -> None:
    world = await full_world()
    await world.ask(job_request())
    await world.matcher.on_cancel(CancelJob(job_id=hex16("job")))
    await end(world, "one")
    await world.sweep(0.1, ALICE)
    assert world.heard() == ["waiting"]
    assert world.types() == []


async def test_a_turn_in_vain_does_not_renew_the_deadline() -> None:
    world = await full_world()
    await world.ask(job_request(max_price_nanoton=10_000))
    for _ in range(20):
        await world.sweep(0.5, ALICE)
    await world.sweep(0.5, ALICE)
    assert world.heard() == ["waiting", "refused"]


async def test_money_that_went_while_waiting_is_found_out() -> None:
    world = await ready_world(25_000, ALICE)
    await world.ask(job_request("one"), job_request("two"))
    await world.ask(job_request())
    world.report("one", "began")
    world.leases.end(hex16("one"), world.leases.live[hex16("one")], "gone", may_rematch=False)
    world.memory.reserve("elsewhere", "acct_1", 10_000)
    await world.settle()
    await world.sweep(0.1, ALICE)
    last = world.log.stream(f"job/{hex16('job')}")[-1].decode()
    assert isinstance(last, FundsRefused)


# ---- fairness between equals, restart ----


async def test_jobs_spread_over_equal_providers() -> None:
    world = await ready_world()
    await world.ask(*(job_request(f"j{index}") for index in range(6)))
    loads = [len(world.memory.providers[p.id].live_jobs) for p in (ALICE, BOB, CAROL)]
    assert loads == [2, 2, 2]


async def test_a_restarted_matcher_knows_the_running_jobs_and_keeps_them() -> None:
    world = await ready_world()
    await world.ask(job_request())
    provider = world.matched_to()
    await world.restart()
    assert set(world.leases.live) == {hex16("job")}
    assert world.memory.available_nanoton("acct_1") == 990_000
    await world.sweep(0.1)
    assert world.types() == GRANTED, "nobody was heard yet, and that is no silence"
    world.beat(provider)
    await world.sweep(2.0, provider)
    assert world.types() == GRANTED


async def test_after_a_restart_a_provider_that_stays_silent_loses_its_job() -> None:
    world = await ready_world()
    await world.ask(job_request())
    silent = world.matched_to()
    others = [p for p in PROVIDERS if p != silent]
    await world.restart()
    await world.sweep(1.0, *others)
    await world.sweep(1.0, *others)
    assert world.types() == GRANTED
    await world.sweep(1.1, *others)
    assert world.types() == [*GRANTED, "LeaseExpired", "ProviderMatched"]


async def test_a_gateways_settings_bound_what_waits() -> None:
    world = MatcherWorld()
    world.settings = replace_settings(world, waiting_limit=0)
    await world.start()
    world.fund()
    world.enrol(ALICE)
    await world.ask(job_request("one"), job_request("two"), job_request())
    assert sorted(world.heard("one") + world.heard("two") + world.heard())[-1] == "refused"


def replace_settings(world: MatcherWorld, **changes: object):  # type: ignore[no-untyped-def]
    return world.settings.model_copy(update=changes)
