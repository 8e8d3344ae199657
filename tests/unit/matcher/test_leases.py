"""A lease ends by silence, refusal, restart, revocation, rejection or time; then comes another."""

from __future__ import annotations

import asyncio

import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import AttestationRevoked, JobFailed, LeaseExpired
from cocoon.contracts.messages import CancelJob
from cocoon.domain.job import fold
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import Unavailable
from cocoon.sealing.receipt import Status
from tests.support.example_events import put
from tests.support.job_world import (
    ALICE,
    PROVIDERS,
    Provider,
    hex16,
    job_request,
    settle_command,
)  # fmt: skip
from tests.support.matcher_world import MatcherWorld, ready_world

GRANTED = ["JobRequested", "FundsHeld", "ProviderMatched"]
AGAIN = [*GRANTED, "LeaseExpired", "ProviderMatched"]
JOB = f"job/{hex16('job')}"


async def running(*providers: Provider, stream: bool = False) -> tuple[MatcherWorld, Provider]:
    world = await ready_world(1_000_000, *providers)
    await world.ask(job_request(stream=stream))
    return world, world.matched_to()


def expired(world: MatcherWorld) -> LeaseExpired:
    found = [e.decode() for e in world.log.stream(JOB) if e.type == "LeaseExpired"][-1]
    assert isinstance(found, LeaseExpired)
    return found


def failure(world: MatcherWorld) -> JobFailed:
    found = world.log.events[-1].decode()
    assert isinstance(found, JobFailed)
    return found


async def beat_all(world: MatcherWorld, passed_s: float) -> None:
    await world.sweep(passed_s, *PROVIDERS)


@pytest.mark.parametrize(
    ("outcome", "code", "reason", "counts"),
    [
        ("busy", "none", "busy", False),
        ("silent", "none", "silent", True),
        ("refused", "unknown_key", "refused", True),
        ("refused", "wrong_policy", "refused", True),
        ("refused", "expired", "refused", True),
    ],
)
async def test_a_dispatch_that_is_not_taken_goes_to_the_next_candidate(
    outcome: str, code: str, reason: str, counts: bool
) -> None:
    world, first = await running()
    world.report("job", outcome, code)
    await world.settle()
    assert world.types() == AGAIN
    assert world.heard() == ["matched", "committed"] * 2
    assert world.matched_to() != first
    assert (expired(world).reason, expired(world).counts) == (reason, counts)
    assert world.last().epoch == 2


async def test_a_dispatch_that_nobody_heard_before_its_commit_goes_on_right_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead provider's connection is closed: the bus says so within a millisecond."""
    world = await ready_world(1_000_000)
    commits, append = asyncio.Event(), world.appender.append

    async def late(item: AppendItem) -> object:
        await commits.wait()
        return await append(item)

    monkeypatch.setattr(world.appender, "append", late)
    asking = asyncio.create_task(world.ask(job_request()))
    for _ in range(10):
        await asyncio.sleep(0)
    world.report("job", "silent")
    commits.set()
    await asking
    await world.settle()

    assert world.types() == AGAIN
    assert world.last().epoch == 2


@pytest.mark.parametrize(
    ("outcome", "code", "status", "told"),
    [
        ("refused", "unknown_key", 409, "reseal"),
        ("refused", "wrong_policy", 409, "reseal"),
        ("refused", "expired", 409, "reseal"),
        ("refused", "bad_request", 400, "bad_request"),
    ],
)
async def test_when_nobody_else_is_there_the_client_is_told_why_and_gets_its_money_back(
    outcome: str, code: str, status: int, told: str
) -> None:
    world, _ = await running(ALICE)
    world.report("job", outcome, code)
    await world.settle()
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]
    assert world.last().kind == "ended"
    assert world.last().error is not None
    assert (world.last().error.status, world.last().error.code) == (status, told)  # type: ignore[union-attr]
    assert world.memory.available_nanoton("acct_1") == 1_000_000
    assert world.leases.live == {}
    assert world.memory.providers[ALICE.id].live_jobs == set()


async def test_a_slow_answer_of_the_only_provider_that_is_heard_fails_nothing() -> None:
    world, _ = await running(ALICE)
    world.report("job", "silent")
    await world.settle()
    assert world.types() == GRANTED
    await world.sweep(4.0)  # and then it is heard no more
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]
    assert expired(world).reason == "silent"


async def test_an_envelope_that_cannot_be_opened_is_tried_nowhere_else() -> None:
    world, _ = await running()
    world.report("job", "refused", "bad_request")
    await world.settle()
    assert failure(world).reason == "bad_request"


async def test_a_report_of_an_older_epoch_is_nobodys_business() -> None:
    world, _ = await running()
    world.report("job", "silent")
    await world.settle()
    world.report("job", "silent", epoch=1)
    await world.settle()
    assert world.types() == AGAIN


async def test_a_report_that_comes_before_the_commit_waits_for_it() -> None:
    world = await ready_world()
    world.appender.hold()

    asking = asyncio.create_task(world.ask(job_request()))
    await world.settle()
    world.report("job", "busy")
    await world.settle()
    assert world.types() == []
    world.appender.release()
    await asking
    await world.settle()
    assert world.types() == AGAIN


async def test_heartbeats_that_name_the_job_keep_its_lease_alive() -> None:
    world, _ = await running()
    for _ in range(30):
        await beat_all(world, 1.0)
    assert world.types() == GRANTED


async def test_heartbeats_that_do_not_name_the_job_let_its_lease_run_out() -> None:
    world, provider = await running()
    for _ in range(11):
        world.clock.passed_s += 1.0
        for other in PROVIDERS:
            world.leases.on_heartbeat(other.beat())
        await world.sweep()
    assert world.types() == AGAIN
    assert (expired(world).reason, expired(world).provider_id) == ("expired", provider.id)


async def test_a_heartbeat_of_an_older_epoch_renews_nothing() -> None:
    world, _ = await running()
    world.report("job", "busy")
    await world.settle()
    second = world.matched_to()
    for _ in range(11):
        world.clock.passed_s += 1.0
        for other in PROVIDERS:
            stale = ((hex16("job"), 1),) if other == second else ()
            world.leases.on_heartbeat(other.beat(*stale))
        await world.sweep()
    assert world.types()[-2:] == ["LeaseExpired", "ProviderMatched"]
    assert len(world.types()) == 7


async def test_a_provider_that_falls_silent_loses_its_job_after_three_seconds() -> None:
    world, gone = await running()
    others = [p for p in PROVIDERS if p != gone]
    await world.sweep(3.0, *others)
    assert world.types() == GRANTED
    await world.sweep(0.1, *others)
    assert world.types() == AGAIN
    assert expired(world).reason == "silent"
    assert world.matched_to() != gone


async def test_a_provider_that_restarted_without_the_job_loses_it_at_once() -> None:
    world, provider = await running()
    world.leases.on_heartbeat(provider.beat(boot="boot 2"))
    await world.settle()
    assert world.types() == AGAIN
    assert expired(world).reason == "gone"


async def test_a_revoked_provider_loses_its_jobs_and_gets_no_more() -> None:
    world, provider = await running()
    revoked = AttestationRevoked(
        provider_id=provider.id, evidence_id=provider.evidence_id, reason="ban"
    )
    put(world.network, f"provider/{provider.id}", [revoked])
    world.tail()
    await world.settle()
    assert world.types() == AGAIN
    assert expired(world).reason == "revoked"
    assert world.matched_to() != provider
    await world.ask(*(job_request(f"more{index}") for index in range(3)))
    assert all(world.matched_to(f"more{index}") != provider for index in range(3))


async def test_a_rejected_result_ends_the_lease_at_once() -> None:
    world, _ = await running()
    state = world.memory.jobs[hex16("job")]
    put(world.log, JOB, decide_settle_result(state, settle_command(state, price_nanoton=1)))
    world.tail()
    await world.settle()
    assert world.types() == [*GRANTED, "ResultRejected", "LeaseExpired", "ProviderMatched"]
    assert expired(world).reason == "rejected"


@pytest.mark.parametrize("how", ["expired", "gone", "revoked"])
async def test_once_output_has_begun_a_lost_provider_ends_the_job(how: str) -> None:
    world, provider = await running()
    world.report("job", "began")
    if how == "expired":
        await world.sweep(10.1, *(p for p in PROVIDERS if p != provider))
    elif how == "gone":
        world.leases.on_heartbeat(provider.beat(boot="boot 2"))
    else:
        event = AttestationRevoked(
            provider_id=provider.id, evidence_id=provider.evidence_id, reason="ban"
        )
        put(world.network, f"provider/{provider.id}", [event])
        world.tail()
    await world.settle()
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]
    assert failure(world).reason == "provider_lost"


async def test_the_first_byte_is_a_sample_of_the_providers_speed_once() -> None:
    world, provider = await running(stream=True)
    world.clock.passed_s += 0.2
    world.report("job", "began")
    world.clock.passed_s += 5.0
    world.report("job", "began")
    view = world.memory.providers[provider.id]
    assert view.first_token_samples == 1
    assert 199_000 <= view.first_token_us <= 201_000


async def test_a_whole_answer_is_no_sample_of_the_first_token() -> None:
    world, provider = await running(stream=False)
    world.clock.passed_s += 5.0
    world.report("job", "began")
    assert world.memory.providers[provider.id].first_token_samples == 0


async def test_a_settled_job_has_no_lease() -> None:
    world, provider = await running()
    state = world.memory.jobs[hex16("job")]
    put(world.log, JOB, decide_settle_result(state, settle_command(state)))
    world.tail()
    assert (world.leases.live, world.memory.jobs) == ({}, {})
    await world.sweep(60.0)
    assert world.types()[-1] == "PaymentSettled"
    assert world.memory.available_nanoton("acct_1") == 1_000_000 - 285
    assert world.memory.providers[provider.id].live_jobs == set()


async def test_billing_was_first_so_the_expiry_writes_nothing() -> None:
    world, _ = await running()
    state = world.memory.jobs[hex16("job")]
    events = decide_settle_result(state, settle_command(state))
    world.log.append(  # committed, and not yet heard here
        AppendItem("s", b"{}", "billing", hex16("job"), ((JOB, state.version),),
                   tuple(NewEvent(JOB, event) for event in events))
    )  # fmt: skip
    world.leases.end(hex16("job"), world.leases.live[hex16("job")], "silent", may_rematch=True)

    for _ in range(5):
        await asyncio.sleep(0)
    world.tail()
    await asyncio.sleep(0.05)
    assert world.types()[-1] == "PaymentSettled"
    assert fold(e.decode() for e in world.log.stream(JOB)).status.is_terminal
    assert world.leases.live == {}


async def test_an_expiry_that_cannot_be_written_is_tried_again() -> None:
    world, gone = await running()
    others = [p for p in PROVIDERS if p != gone]
    world.appender.fail(Unavailable("the log's queue is full"))
    await world.sweep(3.1, *others)
    assert world.types() == GRANTED
    await world.sweep(0.1, *others)
    assert world.types() == AGAIN


async def test_an_expiry_whose_answer_was_lost_happens_once() -> None:
    world, gone = await running()
    world.appender.lose_answer()
    await world.sweep(3.1, *(p for p in PROVIDERS if p != gone))
    assert world.types() == AGAIN


async def test_a_zombie_ends_no_lease() -> None:
    world, _ = await running()
    world.log.acquire_term("matcher")
    world.report("job", "silent")
    await world.settle()
    assert [error.code for error in world.stopped] == ["stale_term"]
    assert world.types() == GRANTED


async def test_three_providers_may_fail_a_job_and_no_more() -> None:
    world, _ = await running()
    for epoch in (1, 2, 3):
        world.report("job", "refused", "unknown_key", epoch=epoch)
        await world.settle()
    assert failure(world).reason == "attempts_exhausted"
    assert world.last().error is not None
    assert world.last().error.status == 503  # type: ignore[union-attr]


# ---- cancel ----


async def test_a_cancelled_job_gives_its_provider_time_to_settle_and_then_ends() -> None:
    world, _ = await running()
    await world.matcher.on_cancel(CancelJob(job_id=hex16("job")))
    for _ in range(4):  # as long as heartbeats name it, its receipt is still to come
        await beat_all(world, 2.5)
    assert world.types() == GRANTED
    for _ in range(3):
        for provider in PROVIDERS:
            world.leases.on_heartbeat(provider.beat())
        await world.sweep(2.5)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobCancelled"]
    assert world.last().kind == "ended"
    assert world.memory.available_nanoton("acct_1") == 1_000_000


async def test_no_heartbeat_renews_a_lease_for_ever() -> None:
    world, _ = await running(ALICE)
    for _ in range(1250):
        await world.sweep(2.9, ALICE)
        if world.types() != GRANTED:
            break
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]


async def test_what_was_delivered_before_the_cancel_is_settled_if_the_receipt_comes() -> None:
    world, _ = await running()
    await world.matcher.on_cancel(CancelJob(job_id=hex16("job")))
    state = world.memory.jobs[hex16("job")]
    put(world.log, JOB, decide_settle_result(state, settle_command(state, status=Status.CANCELLED)))
    world.tail()
    await beat_all(world, 9.0)
    assert world.types()[-1] == "PaymentSettled"


async def test_a_cancelled_job_whose_provider_is_lost_is_not_matched_again() -> None:
    world, provider = await running()
    await world.matcher.on_cancel(CancelJob(job_id=hex16("job")))
    world.leases.on_heartbeat(provider.beat(boot="boot 2"))
    await world.settle()
    assert world.types() == [*GRANTED, "LeaseExpired", "JobCancelled"]


async def test_a_cancel_for_an_unknown_job_is_ignored() -> None:
    world, _ = await running()
    await world.matcher.on_cancel(CancelJob(job_id=hex16("unknown")))
    await beat_all(world, 6.0)
    assert world.types() == GRANTED


async def test_a_provider_that_began_has_the_whole_lease_for_its_result() -> None:
    world, provider = await running()
    world.report("job", "began")
    others = [p for p in PROVIDERS if p != provider]
    await world.sweep(5.0, *others)
    assert world.types() == GRANTED
    await world.sweep(5.1, *others)
    assert world.types() == [*GRANTED, "LeaseExpired", "JobFailed"]
    assert expired(world).reason == "expired"


async def test_what_a_deaf_matcher_did_not_hear_is_no_providers_fault() -> None:
    world, provider = await running()
    world.clock.passed_s += 60.0
    world.matcher.deaf()
    await world.sweep(2.0)
    assert world.types() == GRANTED
    world.beat(provider)
    await world.sweep(9.0, provider)
    assert world.types() == GRANTED


async def test_after_deafness_silence_counts_again() -> None:
    world, _ = await running()
    world.clock.passed_s += 60.0
    world.matcher.deaf()
    await world.sweep(3.1)
    assert "LeaseExpired" in world.types()
