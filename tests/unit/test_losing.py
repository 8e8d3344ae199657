"""A provider is told which jobs it did not get, by what and how far, nothing of others."""

from __future__ import annotations

import dataclasses

import pytest

from cocoon.contracts.commands import Candidate, ExpireLease, RequestJob
from cocoon.contracts.matching import BALANCED, Preferences
from cocoon.domain.job import JobState
from cocoon.domain.losing import MAX_BPS, Decision, Lost, lost_by
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    MODEL,
    NOW_MS,
    PROVIDERS,
    QUOTE,
    expire_command,
    hex16,
    hex32,
    matched_job,
    request_command,
)  # fmt: skip

KNOWN = {"ended_jobs": 1000}


def decided(*candidates: Candidate, **changes: object) -> Decision:
    return JobState(), request_command(candidates=candidates, policy=BALANCED, **changes)


def only(lost: list[Lost]) -> tuple[str, int | None, str]:
    (one,) = lost
    assert (one.job_id, one.at_ms, one.model_id) == (hex16("job"), NOW_MS, MODEL)
    return one.reason, one.margin_bps, one.sentence


def priced(factor: float) -> dict[str, object]:
    changes = {
        "input_nanoton_per_mtok": int(QUOTE.input_nanoton_per_mtok * factor),
        "cached_input_nanoton_per_mtok": int(QUOTE.cached_input_nanoton_per_mtok * factor),
        "output_nanoton_per_mtok": int(QUOTE.output_nanoton_per_mtok * factor),
    }
    return {**KNOWN, "quote": QUOTE.model_copy(update=changes)}


def test_who_lost_on_price_is_told_by_how_much() -> None:
    pair = decided(ALICE.candidate(**priced(1.0)), BOB.candidate(**priced(0.92)))
    assert only(lost_by(ALICE.id, [pair])) == ("price", 400, "it lost by 4 % on price")
    assert lost_by(BOB.id, [pair]) == []


def test_who_asks_more_than_the_job_may_cost_is_told_how_far_it_is_over() -> None:
    dear = decided(ALICE.candidate(**priced(3.0)), BOB.candidate(**priced(1.0)))
    reason, margin, told = only(lost_by(ALICE.id, [dear]))
    assert (reason, margin) == ("filtered:price", 5000)  # 15,000 of a job that may cost 10,000
    assert told.endswith("the job could cost more with it than the client allows; over by 50 %")


def test_who_asks_more_a_token_than_the_client_allows_is_told_the_greater_excess() -> None:
    asked = Preferences(max_input_nanoton_per_mtok=900_000, max_output_nanoton_per_mtok=2_000_000)
    pair = decided(ALICE.candidate(), BOB.candidate(**priced(0.1)), preferences=asked)
    assert only(lost_by(ALICE.id, [pair]))[:2] == ("filtered:token_price", 10_000)


def test_who_loses_a_sort_by_price_is_told_how_much_dearer_it_was() -> None:
    pair = decided(
        ALICE.candidate(**priced(1.5)), BOB.candidate(**priced(1.0)),
        preferences=Preferences(sort="price"),
    )  # fmt: skip
    reason, margin, told = only(lost_by(ALICE.id, [pair]))
    assert (reason, margin) == ("sort:price", 5000)
    assert told == "it lost on price, by which the client sorts; over by 50 %"


def test_no_margin_is_told_that_would_say_nothing_more() -> None:
    free = decided(
        ALICE.candidate(**priced(1.0)), BOB.candidate(**priced(0.0)),
        preferences=Preferences(sort="price"),
    )  # fmt: skip
    assert only(lost_by(ALICE.id, [free]))[1] == MAX_BPS


@pytest.mark.parametrize(
    ("alices", "asked", "reason"),
    [
        ({"running": 2}, {}, "filtered:capacity"),
        ({"alive": False}, {}, "filtered:alive"),
        ({}, {"ignore": (ALICE.id,)}, "filtered:ignore"),
        ({}, {"order": (BOB.id,)}, "order"),
        ({"first_token_us": 900_000}, {}, "passed_by:slow"),
    ],
)
def test_who_could_not_have_it_is_told_why_and_no_margin(
    alices: dict[str, object], asked: dict[str, object], reason: str
) -> None:
    pool = (
        ALICE.candidate(**KNOWN, **alices),
        *(p.candidate(**KNOWN, first_token_us=1000) for p in (BOB, CAROL)),
    )
    decision = decided(*pool, preferences=Preferences(**asked))  # type: ignore[arg-type]
    assert only(lost_by(ALICE.id, [decision]))[:2] == (reason, None)


def test_of_three_equal_ones_one_is_told_that_it_was_not_drawn() -> None:
    three = decided(*(p.candidate(**KNOWN) for p in PROVIDERS))
    reasons = sorted(lost.reason for p in PROVIDERS for lost in lost_by(p.id, [three]))
    assert reasons == ["draw", "not_drawn"]


def test_a_job_that_was_sealed_to_others_is_lost_by_whoever_offers_its_model() -> None:
    others = decided(BOB.candidate())
    assert lost_by(ALICE.id, [others]) == []
    assert lost_by(ALICE.id, [others], {hex32("another model")}) == []
    assert only(lost_by(ALICE.id, [others], {MODEL})) == (
        "not_sealed", None,
        "the client sealed this job to others, or did not find this provider then",
    )  # fmt: skip


def test_refused_funds_were_lost_by_nobody() -> None:
    assert lost_by(ALICE.id, [decided(BOB.candidate(), available_nanoton=1)], {MODEL}) == []


def test_who_failed_a_job_lost_the_next_match_by_that() -> None:
    state = matched_job(policy=BALANCED)
    assert state.match is not None
    again: ExpireLease = expire_command(policy=BALANCED)
    assert only(lost_by(state.match.provider_id, [(state, again)]))[:2] == ("filtered:tried", None)


def test_a_provider_with_two_keys_that_got_the_job_did_not_lose_it() -> None:
    two = decided(ALICE.candidate(running=2), ALICE.candidate(key_id=hex16("second")))
    command = two[1]
    assert isinstance(command, RequestJob)
    keys = (ALICE.key_id, hex16("second"))
    both = (JobState(), command.model_copy(update={"recipient_key_ids": keys}))
    assert lost_by(ALICE.id, [both]) == []


def test_nobody_else_is_named() -> None:
    decisions = [
        decided(ALICE.candidate(**priced(f)), BOB.candidate(**priced(1.0)), CAROL.candidate())
        for f in (1.1, 3.0)
    ]
    for lost in lost_by(ALICE.id, decisions, {MODEL}):
        told = str(dataclasses.astuple(lost))
        for stranger in (BOB.id, CAROL.id, "acct_1", "key_1", "gw1", ALICE.id):
            assert stranger not in told
