"""Nobody is told that he won where nobody was sought."""

from __future__ import annotations

import pytest

from cocoon.contracts.commands import Candidate
from cocoon.contracts.events import FundsRefused, JobCancelled, JobFailed, ProviderMatched
from cocoon.contracts.matching import BALANCED, Preferences
from cocoon.domain.backtest import Backtest
from cocoon.domain.explaining import explain_decision, sentence
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.domain.matching import Standing
from cocoon.domain.reputation import Reputation, observe
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    NOT_AFTER_MS,
    NOW_MS,
    PROVIDERS,
    QUOTE,
    SEED,
    expire_command,
    hex16,
    matched_job,
    request_command,
)  # fmt: skip


def test_a_match_is_explained_with_every_candidate() -> None:
    command = request_command(policy=BALANCED)
    matched = decide_request_job(JobState(), command)[-1]
    told = explain_decision(JobState(), command)
    assert isinstance(matched, ProviderMatched)
    assert told is not None
    assert {one.provider_id for one in told.standings} == {p.id for p in PROVIDERS}
    assert [o.provider_id for o in told.standings if o.outcome == "won"] == [matched.provider_id]
    assert (told.policy, told.policy_hash) == (BALANCED.name, BALANCED.hash)


def test_refused_funds_sought_nobody() -> None:
    command = request_command(available_nanoton=1, policy=BALANCED)
    assert isinstance(decide_request_job(JobState(), command)[-1], FundsRefused)
    assert explain_decision(JobState(), command) is None
    tested = Backtest(BALANCED)
    tested.take(command)
    assert tested.decisions == 0


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"may_rematch": False}, JobFailed),
        ({"now_ms": NOT_AFTER_MS}, JobFailed),
        ({"cancelled": True}, JobCancelled),
    ],
)
def test_a_lease_that_ends_its_job_sought_nobody(changes: dict[str, object], end: type) -> None:
    state, command = matched_job(), expire_command(policy=BALANCED, **changes)
    assert isinstance(decide_expire_lease(state, command)[-1], end)
    assert explain_decision(state, command) is None


def test_who_had_the_job_before_is_told_so_at_the_next_match() -> None:
    state, command = matched_job(), expire_command(policy=BALANCED)
    told = explain_decision(state, command)
    assert state.match is not None
    assert told is not None
    before = next(s for s in told.standings if s.provider_id == state.match.provider_id)
    assert (before.outcome, before.by, told.epoch) == ("filtered", "tried", 2)


def test_what_a_client_cancelled_says_nothing_of_its_provider() -> None:
    command = expire_command(cancelled=True, may_rematch=False, policy=BALANCED)
    found = Reputation()
    for event in decide_expire_lease(matched_job(), command):
        found = observe(found, event)
    assert found == Reputation()


def test_what_a_client_sealed_wrongly_costs_its_provider_nothing() -> None:
    found = Reputation()
    for event in decide_expire_lease(matched_job(), expire_command(reason="refused")):
        found = observe(found, event)
    assert found == Reputation()


def test_a_provider_that_fell_silent_is_remembered_for_it() -> None:
    found = Reputation()
    for event in decide_expire_lease(matched_job(), expire_command(reason="silent")):
        found = observe(found, event)
    assert (found.ended_jobs, found.success_ppm) == (1, 950_000)


def test_an_explanation_is_told_whole() -> None:
    command = request_command(
        policy=BALANCED, preferences=Preferences(order=(BOB.id,), ignore=(CAROL.id,))
    )
    tiers = {ALICE.id: "attested", BOB.id: "simulated", CAROL.id: None}  # one from before tiers
    candidates = tuple(
        one.model_copy(update={"tier": tiers[one.provider_id]}) for one in command.candidates
    )
    command = command.model_copy(update={"candidates": candidates})
    told = explain_decision(JobState(), command)
    assert told is not None
    expected = {
        BOB.id: ("won", "order", 0, "it got the job, by the client's order"),
        ALICE.id: ("lost", "order", 0, "it lost on the client's order"),
        CAROL.id: ("filtered", "ignore", 0, "it could not get the job: the client ignores it"),
    }
    assert told.told() == {
        "epoch": 1,
        "decided_ms": NOW_MS,
        "policy": "balanced-1",
        "policy_hash": BALANCED.hash,
        "seed": SEED,
        "providers": [
            {
                "provider_id": name,
                "tier": tiers[name],
                "outcome": expected[name][0],
                "by": expected[name][1],
                "margin_permille": expected[name][2],
                "told": expected[name][3],
            }
            for name in sorted(expected)
        ],
    }


def test_a_command_from_before_policies_is_explained_by_the_first_rule() -> None:
    told = explain_decision(JobState(), request_command())
    assert told is not None
    assert (told.policy, told.policy_hash) == ("two-choices", "")
    assert told.told()["policy_hash"] is None


def test_wishes_and_affinity_of_a_later_match_are_heeded() -> None:
    state = matched_job()
    assert state.match is not None
    others = [p for p in PROVIDERS if p.id != state.match.provider_id]
    asked = Preferences(only=(others[0].id, state.match.provider_id))
    told = explain_decision(state, expire_command(policy=BALANCED, preferences=asked))
    assert told is not None
    fared = {s.provider_id: (s.outcome, s.by) for s in told.standings}
    assert fared[others[0].id] == ("won", "only one left")
    assert fared[others[1].id] == ("filtered", "only")
    again = expire_command(reason="busy", again=True, policy=BALANCED, preferences=asked)
    told = explain_decision(state, again)
    assert told is not None
    assert ("filtered", "tried") not in {(s.outcome, s.by) for s in told.standings}


SENTENCES = [
    ("won", "only one left", 0, "it got the job"),
    ("won", "speed", 0, "it got the job, by its wait for a first token"),
    ("won", "price", 0, "it got the job, by price"),
    ("won", "success", 0, "it got the job, by the part of its jobs that end well"),
    ("won", "draw", 0, "it got the job, by the draw: both were equally good"),
    ("won", "exploration", 0, "it got the job, by a turn for a provider without a history"),
    ("won", "sort:price", 0, "it got the job, by price, by which the client sorts"),
    ("won", "sort:latency", 0,
     "it got the job, by its wait for a first token, by which the client sorts"),
    ("won", "sort:throughput", 0, "it got the job, by tokens a second, by which the client sorts"),
    ("lost", "price", 40, "it lost by 4 % on price"),
    ("lost", "speed", 125, "it lost by 12.5 % on its wait for a first token"),
    ("lost", "order", 0, "it lost on the client's order"),
    ("not_drawn", "two_choices", 0, "it was not one of the two that were drawn"),
    ("passed_by", "slow", 0,
     "it was passed by: its first token takes far longer than the middle one's"),
    ("passed_by", "warm_set", 0, "it was passed by: others keep this conversation warm"),
    ("filtered", "recipient", 0,
     "it could not get the job: the request was not sealed to its current key"),
    ("filtered", "model", 0, "it could not get the job: it does not offer this model"),
    ("filtered", "attestation", 0,
     "it could not get the job: its evidence, or its key, had run out"),
    ("filtered", "alive", 0,
     "it could not get the job: its heartbeats were missing, or it drains"),
    ("filtered", "only", 0, "it could not get the job: the client names others only"),
    ("filtered", "ignore", 0, "it could not get the job: the client ignores it"),
    ("filtered", "tier", 0,
     "it could not get the job: its tier is not one that the client asks for"),
    ("filtered", "quantisation", 0,
     "it could not get the job: its quantisation is not one that the client asks for"),
    ("filtered", "region", 0,
     "it could not get the job: its region is not one that the client asks for"),
    ("filtered", "open_limits", 0,
     "it could not get the job: it has no TEE, and the network's policy allows such a provider no "
     "job of this price"),
    ("filtered", "token_price", 0,
     "it could not get the job: its price per token is over what the client allows"),
    ("filtered", "context", 0, "it could not get the job: the request does not fit its context"),
    ("filtered", "price", 0,
     "it could not get the job: the job could cost more with it than the client allows"),
    ("filtered", "tried", 0, "it could not get the job: it had this job before"),
    ("filtered", "capacity", 0, "it could not get the job: all its places were taken"),
    ("filtered", "order", 0,
     "it could not get the job: the client names others, and allows nobody else"),
]  # fmt: skip


@pytest.mark.parametrize(("outcome", "by", "margin", "told"), SENTENCES)
def test_each_is_told_in_one_sentence(outcome: str, by: str, margin: int, told: str) -> None:
    assert sentence(Standing("prov_a", outcome, by, margin)) == told


def fared(pool: tuple[Candidate, ...], **changes: object) -> dict[str, tuple[str, str, int]]:
    command = request_command(candidates=pool, policy=BALANCED, **changes)
    told = explain_decision(JobState(), command)
    assert told is not None
    return {s.provider_id: (s.outcome, s.by, s.margin_permille) for s in told.standings}


KNOWN = {"ended_jobs": 1000}


@pytest.mark.parametrize(
    ("changes", "by"),
    [
        ({"key_id": hex16("another")}, "recipient"),
        ({"valid_until_ms": NOW_MS}, "attestation"),
        ({"alive": False}, "alive"),
        ({"context_tokens": 10}, "context"),
        ({"running": 2}, "capacity"),
    ],
)
def test_who_is_filtered_is_told_by_which(changes: dict[str, object], by: str) -> None:
    found = fared((ALICE.candidate(**changes), BOB.candidate()))
    assert found == {ALICE.id: ("filtered", by, 0), BOB.id: ("won", "only one left", 0)}


def test_a_pair_is_told_the_term_that_decided_and_by_how_much() -> None:
    slow, fast = {**KNOWN, "first_token_us": 80_000}, {**KNOWN, "first_token_us": 40_000}
    pair = (ALICE.candidate(**slow), BOB.candidate(**fast))
    assert fared(pair) == {ALICE.id: ("lost", "speed", 500), BOB.id: ("won", "speed", 0)}
    weak = (ALICE.candidate(**KNOWN, success_ppm=700_000), BOB.candidate(**KNOWN))
    assert fared(weak) == {ALICE.id: ("lost", "success", 300), BOB.id: ("won", "success", 0)}
    even = fared((ALICE.candidate(**KNOWN), BOB.candidate(**KNOWN)))
    assert sorted(even.values()) == [("lost", "draw", 0), ("won", "draw", 0)]


def test_who_is_slow_is_passed_by_and_who_is_not_drawn_is_told_so() -> None:
    crowd = tuple(
        p.candidate(**KNOWN, first_token_us=us)
        for p, us in ((ALICE, 900_000), (BOB, 100_000), (CAROL, 100_000))
    )
    assert fared(crowd)[ALICE.id] == ("passed_by", "slow", 0)
    three = fared(tuple(p.candidate(**KNOWN) for p in PROVIDERS))
    assert sorted(outcome for outcome, _, _ in three.values()) == ["lost", "not_drawn", "won"]
    assert ("not_drawn", "two_choices", 0) in three.values()


def test_who_keeps_no_conversation_warm_is_passed_by() -> None:
    pool = tuple(p.candidate(**KNOWN) for p in PROVIDERS)
    found = fared(pool, affinity=hex16("conversation"))
    assert ("passed_by", "warm_set", 0) in found.values()
    assert sorted(outcome for outcome, _, _ in found.values()) == ["lost", "passed_by", "won"]


@pytest.mark.parametrize("sort", ["price", "latency", "throughput"])
def test_who_loses_a_sort_is_told_which(sort: str) -> None:
    best = {"first_token_us": 10_000, "tokens_per_s": 90}
    cheap = QUOTE.model_copy(update={"output_nanoton_per_mtok": 1})
    pool = (ALICE.candidate(first_token_us=20_000), BOB.candidate(**best, quote=cheap))
    found = fared(pool, preferences=Preferences(sort=sort))  # type: ignore[arg-type]
    assert found == {ALICE.id: ("lost", f"sort:{sort}", 0), BOB.id: ("won", f"sort:{sort}", 0)}
