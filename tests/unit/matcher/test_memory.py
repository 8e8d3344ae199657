"""What the matcher knows is the log folded, plus heartbeats and holds on their way."""

from __future__ import annotations

import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import AttestationRevoked, EventData
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.domain.settling import decide_settle_result
from services.matcher.memory import Memory, ProviderView
from tests.support.example_events import put
from tests.support.job_world import (
    ALICE,
    BOB,
    MODEL,
    OFFERED,
    PROVIDERS,
    QUOTE,
    expire_command,
    hex16,
    hex32,
    matched_job,
    request_command,
    settle_command,
)  # fmt: skip
from tests.support.model_log import ModelLog

JOB = f"job/{hex16('job')}"


def fed(*events: EventData) -> tuple[Memory, ModelLog]:
    memory, log = Memory(fee_bps=500, silence_s=3.0), ModelLog(1)
    put(log, JOB, events)
    for stored in log.events:
        memory.apply_shard(stored)
    return memory, log


def network(memory: Memory, *events: EventData) -> None:
    log = ModelLog(0)
    put(log, f"provider/{ALICE.id}", events)
    for stored in log.events:
        memory.apply_network(stored)


def known_provider() -> Memory:
    memory = Memory(fee_bps=500, silence_s=3.0)
    network(memory, *ALICE.network_events())
    memory.heartbeat(ALICE.beat(), 100.0)
    return memory


def test_a_provider_becomes_a_candidate_with_the_networks_fee_in_its_quote() -> None:
    (candidate,) = known_provider().candidates([ALICE.key_id], MODEL, 100.0)
    assert candidate.quote == QUOTE
    assert (candidate.provider_id, candidate.key_id) == (ALICE.id, ALICE.key_id)
    assert (candidate.attested_position, candidate.alive, candidate.running) == (3, True, 0)
    assert candidate.valid_until_ms == ALICE.network_events()[3].not_after_ms  # type: ignore[attr-defined]


def test_a_key_of_renewed_evidence_is_matched_under_the_evidence_that_announced_it() -> None:
    *_, attested, bundle = ALICE.network_events()
    fresh, key = hex32("fresh"), hex16("the next key")
    memory = Memory(fee_bps=500, silence_s=3.0)
    network(
        memory, *ALICE.network_events(), attested.model_copy(update={"evidence_id": fresh}),
        bundle.model_copy(update={"evidence_id": fresh, "key_id": key}),
    )  # fmt: skip
    memory.heartbeat(ALICE.beat(), 100.0)
    cited = [
        (found.key_id, found.evidence_id, found.attested_position)
        for found in memory.candidates([ALICE.key_id, key], MODEL, 100.0)
    ]
    assert cited == [(ALICE.key_id, ALICE.evidence_id, 3), (key, fresh, 5)]


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_without_enrolment_offer_evidence_or_key_nobody_is_a_candidate(missing: int) -> None:
    memory = Memory(fee_bps=500, silence_s=3.0)
    events = ALICE.network_events()
    network(memory, *events[:missing], *events[missing + 1 :])
    found = memory.candidates([ALICE.key_id], MODEL, 100.0)
    assert found == () or missing == 0  # the enrolment itself is checked by attestation


def test_keys_that_nobody_holds_are_left_out() -> None:
    memory = known_provider()
    assert memory.candidates([hex16("nobody"), BOB.key_id], MODEL, 100.0) == ()


def test_a_revocation_takes_the_keys_at_once() -> None:
    memory = known_provider()
    network(
        memory,
        AttestationRevoked(provider_id=ALICE.id, evidence_id=ALICE.evidence_id, reason="ban"),
    )
    assert memory.candidates([ALICE.key_id], MODEL, 100.0) == ()
    assert memory.keys == {}


@pytest.mark.parametrize(("passed_s", "alive"), [(0.0, True), (3.0, True), (3.01, False)])
def test_a_provider_is_gone_after_its_silence(passed_s: float, alive: bool) -> None:
    (candidate,) = known_provider().candidates([ALICE.key_id], MODEL, 100.0 + passed_s)
    assert candidate.alive is alive


def test_a_draining_provider_gets_no_new_jobs() -> None:
    memory = known_provider()
    memory.heartbeat(ALICE.beat(draining=True), 100.0)
    (candidate,) = memory.candidates([ALICE.key_id], MODEL, 100.0)
    assert not candidate.alive


def test_a_model_without_room_or_engine_gets_no_jobs_and_the_provider_s_others_do() -> None:
    memory = known_provider()
    full = ALICE.beat().model_copy(update={"full": (MODEL,)})
    memory.heartbeat(full, 100.0)
    (candidate,) = memory.candidates([ALICE.key_id], MODEL, 100.0)
    assert candidate.alive
    assert candidate.running == candidate.concurrency  # a job waits for room, it does not fail
    other = hex32("another model")
    (candidate,) = memory.candidates([ALICE.key_id], other, 100.0)
    assert (candidate.alive, candidate.running) == (True, 0)
    away = ALICE.beat().model_copy(update={"away": (MODEL,)})
    memory.heartbeat(away, 101.0)
    (candidate,) = memory.candidates([ALICE.key_id], MODEL, 101.0)
    assert not candidate.alive
    assert memory.is_alive(ALICE.id, 101.0)  # its leases go on
    (candidate,) = memory.candidates([ALICE.key_id], other, 101.0)
    assert candidate.alive
    memory.heartbeat(ALICE.beat(), 102.0)
    (candidate,) = memory.candidates([ALICE.key_id], MODEL, 102.0)
    assert (candidate.alive, candidate.running) == (True, 0)


def test_a_new_boot_is_a_restart_and_the_first_beat_is_not() -> None:
    memory = Memory(fee_bps=500, silence_s=3.0)
    assert not memory.heartbeat(ALICE.beat(), 1.0)
    assert not memory.heartbeat(ALICE.beat(), 2.0)
    assert memory.heartbeat(ALICE.beat(boot="boot 2"), 3.0)


def test_the_load_is_what_is_leased_and_what_is_reported_besides() -> None:
    memory, _ = fed(*decide_request_job(JobState(), request_command(providers=(ALICE,))))
    network(memory, *ALICE.network_events())
    memory.heartbeat(ALICE.beat(), 100.0)
    assert memory.candidates([ALICE.key_id], MODEL, 100.0)[0].running == 1
    memory.heartbeat(ALICE.beat((hex16("job"), 1)), 100.0)
    assert memory.candidates([ALICE.key_id], MODEL, 100.0)[0].running == 1
    memory.heartbeat(ALICE.beat((hex16("job"), 1), (hex16("x"), 1)), 100.0)
    assert memory.candidates([ALICE.key_id], MODEL, 100.0)[0].running == 2


@pytest.mark.parametrize(("reported", "room"), [(1, 1), (0, 0), (10_000, None)])
def test_an_agent_whose_engine_has_other_work_gets_fewer_jobs_and_never_more_than_offered(
    reported: int, room: int | None
) -> None:
    memory = known_provider()
    (before,) = memory.candidates([ALICE.key_id], MODEL, 100.0)
    memory.heartbeat(ALICE.beat().model_copy(update={"concurrency": reported}), 100.0)
    (after,) = memory.candidates([ALICE.key_id], MODEL, 100.0)
    assert after.concurrency == (before.concurrency if room is None else room)


def test_an_offer_without_the_model_is_still_a_candidate_so_that_the_filter_says_why() -> None:
    (candidate,) = known_provider().candidates([ALICE.key_id], hex32("other"), 100.0)
    assert candidate.quote.model_id == OFFERED.model_id


def test_time_to_first_token_follows_fast_at_first_and_slowly_later() -> None:
    view = ProviderView()
    view.observe_first_token(1000)
    assert view.first_token_us == 1000
    view.observe_first_token(2000)
    assert view.first_token_us == 1500
    for _ in range(6):
        view.observe_first_token(1500)
    view.observe_first_token(2500)
    assert view.first_token_us == 1600


def test_a_job_lives_from_its_request_to_its_end_and_is_then_forgotten() -> None:
    state = matched_job()
    first = decide_request_job(JobState(), request_command())
    memory, log = fed(*first)
    assert memory.jobs[hex16("job")] == state
    assert state.match is not None
    assert memory.providers[state.match.provider_id].live_jobs == {hex16("job")}
    put(log, JOB, decide_settle_result(state, settle_command(state)))
    for stored in log.events[3:]:
        memory.apply_shard(stored)
    assert memory.jobs == {}
    assert memory.providers[state.match.provider_id].live_jobs == set()


def test_a_new_match_moves_the_load_to_the_new_provider() -> None:
    state = matched_job()
    events = decide_expire_lease(state, expire_command())
    memory, _ = fed(*decide_request_job(JobState(), request_command()), *events)
    assert state.match is not None
    loads = {p.id: memory.providers[p.id].live_jobs for p in PROVIDERS if p.id in memory.providers}
    assert loads[state.match.provider_id] == set()
    assert loads[events[1].provider_id] == {hex16("job")}  # type: ignore[attr-defined]


def test_own_events_are_folded_once_though_the_tail_brings_them_again() -> None:
    log = ModelLog(1)
    put(log, JOB, decide_request_job(JobState(), request_command()))
    once, twice = Memory(500, 3.0), Memory(500, 3.0)
    for stored in log.events:
        once.apply_shard(stored)
    twice.apply_appended(log.events)
    for stored in log.events:
        twice.apply_shard(stored)
    assert twice.jobs == once.jobs
    assert twice.accounts == once.accounts


def test_an_append_that_is_answered_after_the_jobs_end_does_not_bring_the_job_back() -> None:
    """Else its provider would have one place less for ever (found by the simulator)."""
    state = matched_job()
    memory, log = fed(*decide_request_job(JobState(), request_command()))
    own = list(log.events)
    put(log, JOB, decide_settle_result(state, settle_command(state)))
    for stored in log.events[len(own) :]:
        memory.apply_shard(stored)
    assert memory.jobs == {}
    memory.apply_appended(own)
    assert memory.jobs == {}
    assert all(view.live_jobs == set() for view in memory.providers.values())


def test_a_late_rejection_does_not_bring_an_ended_job_back() -> None:
    state = matched_job()
    ended = decide_expire_lease(state, expire_command(cancelled=True))
    memory, log = fed(*decide_request_job(JobState(), request_command()), *ended)
    put(log, JOB, decide_settle_result(fold(ended, state), settle_command(state)))
    assert log.events[-1].type == "ResultRejected"
    memory.apply_shard(log.events[-1])
    assert memory.jobs == {}


def test_holds_on_their_way_reduce_what_is_spendable_until_the_log_brings_them() -> None:
    memory, _log = fed()
    memory.accounts["acct_1"] = memory._account("acct_1")
    memory.accounts["acct_1"].balance_nanoton = 25_000
    memory.reserve("j1", "acct_1", 10_000)
    memory.reserve("j2", "acct_1", 10_000)
    memory.reserve("j2", "acct_1", 10_000)  # the same job again
    assert memory.available_nanoton("acct_1") == 5_000
    memory.release_pending("j1")
    memory.release_pending("j1")
    assert memory.available_nanoton("acct_1") == 15_000
    memory.reserve("j3", "acct_1", 99_000)
    assert memory.available_nanoton("acct_1") == 0


def test_a_hold_is_never_counted_twice_while_the_tail_brings_it() -> None:
    log = ModelLog(1)
    item = AppendItem(
        "c", b"{}", "test", hex16("job"), (),
        tuple(NewEvent(JOB, e) for e in decide_request_job(JobState(), request_command())),
    )  # fmt: skip
    log.append(item)
    memory = Memory(500, 3.0)
    memory.accounts["acct_1"] = memory._account("acct_1")
    memory.accounts["acct_1"].balance_nanoton = 30_000
    memory.reserve(hex16("job"), "acct_1", 10_000)
    seen = []
    for stored in log.events:
        memory.apply_shard(stored)
        seen.append(memory.available_nanoton("acct_1"))
    assert seen == [20_000, 20_000, 20_000]
    assert memory.pending_holds == {}


def test_a_key_stays_with_who_announced_it_first_whoever_else_names_it() -> None:
    """Public keys are public: a bundle signed by another's enclave may name this one's."""
    memory = known_provider()
    *others, bundle = BOB.network_events()
    copied = bundle.model_copy(update={"key_id": ALICE.key_id})
    revoked = AttestationRevoked(provider_id=BOB.id, evidence_id=BOB.evidence_id, reason="banned")
    log = ModelLog(0)
    put(log, f"provider/{BOB.id}", [*others, copied, revoked])
    for stored in log.events:
        memory.apply_network(stored)
        (candidate,) = memory.candidates([ALICE.key_id], MODEL, 100.0)
        assert candidate.provider_id == ALICE.id
