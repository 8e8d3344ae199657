"""Hard filters name what emptied them; the draw is a function of the snapshot and the seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.contracts.commands import Candidate
from cocoon.domain.matching import Need, NoCandidate, choose
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    MODEL,
    NOW_MS,
    PROVIDERS,
    QUOTE,
    SEED,
    Provider,
    hex16,
    hex32,
)  # fmt: skip
from tests.support.sentences import is_sentence

NEED = Need(
    model_id=MODEL, recipient_key_ids=tuple(p.key_id for p in PROVIDERS),
    max_price_nanoton=10_000, max_input_tokens=1000, max_output_tokens=1000, now_ms=NOW_MS,
)  # fmt: skip
DEAR = QUOTE.model_copy(update={"output_nanoton_per_mtok": 10**12})


@pytest.mark.parametrize(
    ("changes", "emptied_by"),
    [
        ({"key_id": hex16("somebody else's key")}, "recipient"),
        ({"quote": QUOTE.model_copy(update={"model_id": hex32("other")})}, "model"),
        ({"valid_until_ms": NOW_MS}, "attestation"),
        ({"alive": False}, "alive"),
        ({"context_tokens": 1999}, "context"),
        ({"quote": DEAR}, "price"),
        ({"running": 2}, "capacity"),
        ({"running": 3}, "capacity"),
    ],
)
def test_a_provider_that_fails_a_filter_is_never_chosen(
    changes: dict[str, object], emptied_by: str
) -> None:
    refused = choose((ALICE.candidate(**changes),), NEED, SEED)
    assert isinstance(refused, NoCandidate)
    assert refused.emptied_by == emptied_by
    assert refused.is_capacity == (emptied_by == "capacity")
    assert is_sentence(refused.message)
    chosen = choose((ALICE.candidate(**changes), BOB.candidate()), NEED, SEED)
    assert isinstance(chosen, Candidate)
    assert chosen.provider_id == BOB.id


@pytest.mark.parametrize(
    "changes",
    [{"valid_until_ms": NOW_MS + 1}, {"context_tokens": 2000}, {"running": 1}],
)
def test_a_provider_just_within_its_bounds_is_chosen(changes: dict[str, object]) -> None:
    assert isinstance(choose((ALICE.candidate(**changes),), NEED, SEED), Candidate)


@pytest.mark.parametrize(("offered", "enough"), [(5000, True), (4999, False)])
def test_a_job_may_cost_all_that_it_offers(offered: int, enough: bool) -> None:
    need = replace(NEED, max_price_nanoton=offered)
    assert isinstance(choose((ALICE.candidate(),), need, SEED), Candidate) == enough


def test_nobody_at_all_fails_closed_and_names_the_recipients() -> None:
    refused = choose((), NEED, SEED)
    assert isinstance(refused, NoCandidate)
    assert refused.emptied_by == "recipient"


def test_a_provider_that_was_tried_is_not_tried_again() -> None:
    need = Need(**{**_fields(NEED), "excluded_providers": frozenset({ALICE.id})})
    refused = choose((ALICE.candidate(),), need, SEED)
    assert isinstance(refused, NoCandidate)
    assert refused.emptied_by == "tried"


def _fields(need: Need) -> dict[str, object]:
    return {name: getattr(need, name) for name in Need.__slots__}


loads = st.builds(
    lambda p, running, concurrency, first_token_us: p.candidate(
        running=running, concurrency=concurrency, first_token_us=first_token_us
    ),
    st.sampled_from(PROVIDERS),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
pools = st.lists(loads, max_size=3, unique_by=lambda c: c.provider_id).map(tuple)
seeds = st.binary(min_size=32, max_size=32).map(bytes.hex)


@settings(max_examples=50)
@given(pools, seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_snapshot_does_not_change_the_choice(
    pool: tuple[Candidate, ...], seed: str, shuffle: random.Random
) -> None:
    shuffled = list(pool)
    shuffle.shuffle(shuffled)
    assert choose(pool, NEED, seed) == choose(tuple(shuffled), NEED, seed)


@settings(max_examples=50)
@given(pools, seeds)
def test_the_slowest_of_the_free_is_never_chosen_over_a_faster_pair(
    pool: tuple[Candidate, ...], seed: str
) -> None:
    free = [c for c in pool if c.running < c.concurrency]
    chosen = choose(pool, NEED, seed)
    if not free:
        assert isinstance(chosen, NoCandidate)
        return
    assert isinstance(chosen, Candidate)
    waits = sorted((c.running + 1) * (c.first_token_us or 50_000) / c.concurrency for c in free)
    mine = (chosen.running + 1) * (chosen.first_token_us or 50_000) / chosen.concurrency
    assert len(free) == 1 or mine <= waits[-2] or waits[-1] == waits[-2]


def test_of_two_the_one_with_the_shorter_wait_is_chosen_whatever_the_seed() -> None:
    slow, fast = ALICE.candidate(first_token_us=90_000), BOB.candidate(first_token_us=10_000)
    for index in range(20):
        assert choose((slow, fast), NEED, hex32(f"seed {index}")) == fast


def load(provider: Provider, running: int, concurrency: int, first_token_us: int) -> Candidate:
    return provider.candidate(
        running=running, concurrency=concurrency, first_token_us=first_token_us
    )


@pytest.mark.parametrize(
    ("alices", "bobs", "winner"),
    [
        ((0, 1, 100), (0, 1, 101), ALICE),
        ((0, 1, 100), (0, 1, 99), BOB),
        ((1, 2, 300), (0, 2, 599), BOB),  # two wait of two places, or one of two
        ((1, 2, 300), (0, 2, 601), ALICE),
        ((1, 2, 299), (2, 3, 300), ALICE),  # (1 + 1) / 2 = (2 + 1) / 3
        ((1, 2, 301), (2, 3, 300), BOB),
        ((0, 1, 0), (0, 1, 49_999), BOB),  # without a history: 50 ms
        ((0, 1, 0), (0, 1, 50_001), ALICE),
    ],
)
def test_of_two_the_shorter_queue_over_capacity_times_first_token_wins(
    alices: tuple[int, int, int], bobs: tuple[int, int, int], winner: Provider
) -> None:
    pair = (load(ALICE, *alices), load(BOB, *bobs))
    for index in range(8):
        chosen = choose(pair, NEED, hex32(f"seed {index}"))
        assert isinstance(chosen, Candidate)
        assert chosen.provider_id == winner.id


def test_of_two_that_are_even_the_lower_id_wins_in_whatever_order_they_are_drawn() -> None:
    pair = (load(ALICE, 1, 2, 300), load(BOB, 2, 3, 300))
    lower = min(pair, key=lambda candidate: candidate.provider_id)
    assert {choose(pair, NEED, hex32(f"seed {index}")) for index in range(12)} == {lower}


def test_the_same_seeds_draw_the_same_providers_for_ever() -> None:
    """Old logs are decided again: these were drawn by the first version, and stand."""
    crowd = tuple(Provider(f"crowd {index}") for index in range(12))
    by_id = sorted((p.candidate() for p in crowd), key=lambda c: c.provider_id)
    need = replace(NEED, recipient_key_ids=tuple(p.key_id for p in crowd))
    drawn = [choose(tuple(by_id), need, hex32(f"seed {index}")) for index in range(16)]
    assert [by_id.index(c) for c in drawn] == [1, 0, 3, 2, 4, 3, 1, 3, 0, 3, 0, 8, 3, 3, 1, 2]  # type: ignore[arg-type]


def test_of_one_provider_s_two_keys_the_first_drawn_is_taken() -> None:
    keys = [hex16("older key"), hex16("newer key")]
    two = tuple(ALICE.candidate(key_id=key) for key in keys)
    need = replace(NEED, recipient_key_ids=tuple(keys))
    drawn = [choose(two, need, hex32(f"seed {index}")) for index in range(12)]
    assert [keys.index(c.key_id) for c in drawn] == [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0]  # type: ignore[union-attr]


def test_three_equal_providers_share_the_jobs() -> None:
    equal = tuple(p.candidate() for p in PROVIDERS)
    draws = [choose(equal, NEED, hex32(f"seed {index}")) for index in range(300)]
    shares = {p.id: sum(d.provider_id == p.id for d in draws) for p in (ALICE, BOB, CAROL)}  # type: ignore[union-attr]
    assert sum(share > 0 for share in shares.values()) >= 2
    assert max(shares.values()) <= 250
