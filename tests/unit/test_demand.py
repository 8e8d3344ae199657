"""What an offer would have earned: repeatable, bounded by what the log has, sane in its price."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.contracts.matching import BALANCED, OpenTierLimits, Preferences
from cocoon.domain import pricing
from cocoon.domain.demand import HOUR_MS, MIN_JOBS, Estimate, Job, Offer, Simulation
from cocoon.domain.pricing import TokenCounts
from tests.support.job_world import ALICE, BOB, CAROL, NOW_MS, QUOTE, hex32, request_command

COUNTS = TokenCounts(input=100, cached_input=20, output=50, reasoning=5)
POOL = (BOB.candidate(ended_jobs=1000), CAROL.candidate(ended_jobs=1000))
OFFER = Offer(
    provider_id=ALICE.id, quote=QUOTE, concurrency=64, context_tokens=8192, others=2,
    policy=BALANCED,
)  # fmt: skip


def jobs(count: int, every_ms: int = 60_000, **changes: object) -> list[Job]:
    return [
        Job(
            request_command(
                f"job{n}", candidates=POOL, seed=hex32(f"seed {n}"), policy=BALANCED,
                now_ms=NOW_MS + n * every_ms, **changes,
            ),
            COUNTS, 100,
        )
        for n in range(count)
    ]  # fmt: skip


def simulated(offer: Offer, found: list[Job]) -> Estimate:
    simulation = Simulation(offer)
    for job in found:
        simulation.take(job)
    return simulation.estimate()


def at_price(output: int) -> Offer:
    return replace(OFFER, quote=QUOTE.model_copy(update={"output_nanoton_per_mtok": output}))


def test_the_same_jobs_and_offer_give_the_same_estimate() -> None:
    assert simulated(OFFER, jobs(120)) == simulated(OFFER, jobs(120))


def test_what_it_won_is_paid_by_the_receipts_counts_and_spread_over_the_time() -> None:
    found = simulated(OFFER, jobs(121))
    part = pricing.split(pricing.price(QUOTE, COUNTS), QUOTE.fee_bps).provider
    assert found.jobs == 121
    assert found.span_ms == 2 * HOUR_MS
    assert found.per_hour == found.won * part // 2
    assert found.low < found.per_hour < found.high


def test_too_few_jobs_say_nothing() -> None:
    found = simulated(OFFER, jobs(MIN_JOBS - 1))
    assert (found.enough, found.per_hour, found.high) == (False, 0, 0)
    assert simulated(OFFER, jobs(MIN_JOBS)).enough


def test_jobs_at_one_moment_say_nothing_of_an_hour() -> None:
    assert not simulated(OFFER, jobs(MIN_JOBS, every_ms=0)).enough


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40_000_000), min_size=2, max_size=2).map(sorted))
def test_a_dearer_offer_never_gets_more_jobs(prices: list[int]) -> None:
    cheap, dear = (simulated(at_price(price), jobs(60)) for price in prices)
    assert cheap.won >= dear.won


def test_a_price_of_nothing_wins_jobs_and_earns_nothing() -> None:
    free = replace(
        OFFER,
        quote=QUOTE.model_copy(
            update={
                "input_nanoton_per_mtok": 0, "cached_input_nanoton_per_mtok": 0,
                "output_nanoton_per_mtok": 0,
            }
        ),
    )  # fmt: skip
    found = simulated(free, jobs(60))
    assert found.won > 0
    assert found.per_hour == found.high == 0


def test_over_four_times_the_middle_price_nobody_seals_to_it() -> None:
    assert simulated(at_price(40_000_000), jobs(60)).won == 0


def test_with_a_hundred_others_it_is_sealed_to_seldom() -> None:
    alone = simulated(OFFER, jobs(300))
    crowded = simulated(replace(OFFER, others=100), jobs(300))
    assert 0 < crowded.won < alone.won / 5


def test_places_that_are_taken_get_no_more_jobs() -> None:
    slow = [replace(job, took_ms=10 * HOUR_MS) for job in jobs(120)]
    assert simulated(replace(OFFER, concurrency=2), slow).won == 2


def test_an_unpaid_job_brings_nothing() -> None:
    unpaid = [replace(job, counts=None) for job in jobs(60)]
    found = simulated(OFFER, unpaid)
    assert found.won > 0
    assert found.per_hour == 0


@pytest.mark.parametrize(
    ("asked", "gets"),
    [
        (Preferences(ignore=(ALICE.id,)), False), (Preferences(only=(BOB.id,)), False),
        (Preferences(only=(ALICE.id,)), True), (Preferences(tiers=("attested",)), False),
    ],
)  # fmt: skip
def test_a_clients_wishes_bind_it(asked: Preferences, gets: bool) -> None:
    assert (simulated(OFFER, jobs(60, preferences=asked)).won > 0) is gets


def test_its_own_old_offer_does_not_compete_with_it() -> None:
    pool = (ALICE.candidate(ended_jobs=1000), *POOL)
    found = [
        replace(j, command=j.command.model_copy(update={"candidates": pool})) for j in jobs(60)
    ]
    assert simulated(OFFER, found).won == simulated(OFFER, jobs(60)).won


def test_a_job_that_could_not_be_paid_is_no_demand() -> None:
    assert simulated(OFFER, jobs(60, available_nanoton=0)).jobs == 0


@pytest.mark.parametrize(
    ("limits", "gets"),
    [
        (None, False), (OpenTierLimits(max_running_jobs=9, max_job_nanoton=10**12), True),
        (OpenTierLimits(max_running_jobs=9, max_job_nanoton=1), False),
    ],
)  # fmt: skip
def test_without_a_tee_it_gets_what_the_open_tier_s_limits_allow(
    limits: OpenTierLimits | None, gets: bool
) -> None:
    asked = Preferences(tiers=("open",))
    found = simulated(replace(OFFER, tier="open"), jobs(60, preferences=asked, open_limits=limits))
    assert (found.won > 0) is gets
