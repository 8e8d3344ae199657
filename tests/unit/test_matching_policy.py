"""A matching policy: what the client asks holds, nobody wins everything, everyone is told why."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.contracts.commands import Candidate
from cocoon.contracts.matching import (
    BALANCED,
    MatchingPolicy,
    OpenTierLimits,
    Preferences,
)
from cocoon.domain.matching import Need, NoCandidate, choose, explain
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

CROWD = tuple(Provider(f"crowd {index}", concurrency=8) for index in range(12))
EVERYBODY = (*PROVIDERS, *CROWD)
NEED = Need(
    model_id=MODEL, recipient_key_ids=tuple(p.key_id for p in EVERYBODY),
    max_price_nanoton=10_000, max_input_tokens=1000, max_output_tokens=1000, now_ms=NOW_MS,
)  # fmt: skip
SEEDS = [hex32(f"seed {index}") for index in range(400)]
KNOWN = {"ended_jobs": 1000}  # a history, so that nobody is explored


def asking(**wishes: object) -> Need:
    return replace(NEED, preferences=Preferences(**wishes))  # type: ignore[arg-type]


def winners(pool: tuple[Candidate, ...], need: Need = NEED) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in SEEDS:
        chosen = choose(pool, need, seed, BALANCED)
        assert isinstance(chosen, Candidate)
        found[chosen.provider_id] += 1
    return found


def priced(provider: Provider, factor: float, **changes: object) -> Candidate:
    quote = QUOTE.model_copy(update={
        "input_nanoton_per_mtok": int(QUOTE.input_nanoton_per_mtok * factor),
        "output_nanoton_per_mtok": int(QUOTE.output_nanoton_per_mtok * factor),
    })  # fmt: skip
    return provider.candidate(quote=quote, **{**KNOWN, **changes})


# ---- what the client asks ----


@pytest.mark.parametrize(
    ("wishes", "alices", "emptied_by"),
    [
        ({"only": (BOB.id,)}, {}, "only"),
        ({"ignore": (ALICE.id,)}, {}, "ignore"),
        ({"tiers": ("facility", "attested")}, {"tier": "simulated"}, "tier"),
        ({"tiers": ("attested",)}, {"tier": None}, "tier"),
        ({"quantisations": ("bf16",)}, {"quantisation": "int8"}, "quantisation"),
        ({"quantisations": ("bf16",)}, {"quantisation": None}, "quantisation"),
        ({"regions": ("eu",)}, {"region": "us"}, "region"),
        ({"max_input_nanoton_per_mtok": 999_999}, {}, "token_price"),
        ({"max_output_nanoton_per_mtok": 3_999_999}, {}, "token_price"),
        ({"order": (BOB.id,), "fallbacks": False}, {}, "order"),
    ],
)
def test_who_is_not_what_the_client_asks_for_never_gets_the_job(
    wishes: dict[str, object], alices: dict[str, object], emptied_by: str
) -> None:
    refused = choose((ALICE.candidate(**alices),), asking(**wishes), SEED, BALANCED)
    assert isinstance(refused, NoCandidate)
    assert refused.emptied_by == emptied_by
    assert is_sentence(refused.message)


@pytest.mark.parametrize(
    ("wishes", "alices"),
    [
        ({"only": (ALICE.id,)}, {}),
        ({"ignore": (BOB.id,)}, {}),
        ({"tiers": ("simulated",)}, {"tier": "simulated"}),
        ({"quantisations": ("bf16", "int8")}, {"quantisation": "int8"}),
        ({"regions": ("eu",)}, {"region": "eu"}),
        ({"max_input_nanoton_per_mtok": 1_000_000, "max_output_nanoton_per_mtok": 4_000_000}, {}),
        ({"order": (BOB.id, ALICE.id), "fallbacks": False}, {}),
        ({"order": (BOB.id,)}, {}),
    ],
)
def test_who_is_just_what_the_client_asks_for_may_have_it(
    wishes: dict[str, object], alices: dict[str, object]
) -> None:
    chosen = choose((ALICE.candidate(**alices),), asking(**wishes), SEED, BALANCED)
    assert isinstance(chosen, Candidate)


def test_the_first_of_the_client_s_order_that_can_take_it_gets_it() -> None:
    pool = (ALICE.candidate(), BOB.candidate(running=2), CAROL.candidate())
    need = asking(order=(BOB.id, CAROL.id, ALICE.id))
    assert winners(pool, need) == {CAROL.id: len(SEEDS)}


@pytest.mark.parametrize(
    ("sort", "bobs"),
    [
        ("price", {"quote": priced(BOB, 0.99).quote}),
        ("latency", {"first_token_us": 49_000}),
        ("throughput", {"tokens_per_s": 101}),
    ],
)
def test_a_client_that_sorts_gets_the_best_by_that_alone(
    sort: str, bobs: dict[str, object]
) -> None:
    others = {"tokens_per_s": 100, "first_token_us": 50_000, **KNOWN}
    pool = tuple(
        p.candidate(**{**others, **(bobs if p is BOB else {})}) for p in PROVIDERS
    )  # fmt: skip
    assert winners(pool, asking(sort=sort)) == {BOB.id: len(SEEDS)}


def test_equal_ones_of_a_sort_share_by_their_load() -> None:
    pool = (ALICE.candidate(running=1), BOB.candidate(running=0), CAROL.candidate(running=1))
    assert winners(pool, asking(sort="price")) == {BOB.id: len(SEEDS)}


# ---- the open tier ----

LIMITS = OpenTierLimits(max_running_jobs=2, max_job_nanoton=5000)  # NEED costs at most 5,000
OPEN = {"tier": "open", **KNOWN}


def emptied(need: Need, *pool: Candidate) -> str:
    refused = choose(pool, need, SEED, BALANCED)
    assert isinstance(refused, NoCandidate)
    assert is_sentence(refused.message)
    return refused.emptied_by


def test_a_provider_without_a_tee_gets_no_job_that_did_not_ask_for_it_by_that_name() -> None:
    pool = (ALICE.candidate(**OPEN), BOB.candidate(tier="simulated", running=1, **KNOWN))
    for wishes in ({}, {"order": (ALICE.id,)}, {"sort": "latency"}, {"tiers": ("simulated",)}):
        need = replace(asking(**wishes), open_limits=LIMITS)
        assert winners(pool, need) == {BOB.id: len(SEEDS)}
    alone = replace(asking(only=(ALICE.id,)), open_limits=LIMITS)
    assert emptied(alone, ALICE.candidate(**OPEN)) == "tier"


def test_who_asks_for_the_open_tier_gets_it_within_the_policy_s_limits() -> None:
    need = replace(asking(tiers=("open",)), open_limits=LIMITS)
    chosen = choose((ALICE.candidate(**OPEN, running=1),), need, SEED, BALANCED)
    assert isinstance(chosen, Candidate)
    busy = ALICE.candidate(**OPEN, running=2, concurrency=8)
    assert emptied(need, busy) == "capacity"
    dear = OpenTierLimits(max_running_jobs=2, max_job_nanoton=4999)
    assert emptied(replace(need, open_limits=dear), ALICE.candidate(**OPEN)) == "open_limits"


def test_without_a_policy_that_allows_it_the_open_tier_gets_nothing() -> None:
    assert emptied(asking(tiers=("open",)), ALICE.candidate(**OPEN)) == "open_limits"


# ---- the policy ----


def test_equal_providers_share_the_jobs_evenly() -> None:
    shares = winners(tuple(p.candidate(**KNOWN) for p in PROVIDERS))
    assert set(shares) == {p.id for p in PROVIDERS}
    assert min(shares.values()) > len(SEEDS) // 3 * 0.7


def test_the_very_cheap_does_not_win_everything() -> None:
    """At a hundredth of the price it wins each pair that it is drawn into, and no other."""
    pool = (priced(CROWD[0], 0.01), *(priced(p, 1.0) for p in CROWD[1:]))
    share = winners(pool)[CROWD[0].id] / len(SEEDS)
    assert 0.1 < share < 0.3  # 2 of 12 are drawn


def test_a_tenth_of_the_price_is_not_worth_ten_times_the_wait() -> None:
    cheap = priced(ALICE, 0.1, first_token_us=500_000)
    dear = priced(BOB, 1.0, first_token_us=50_000)
    assert winners((cheap, dear)) == {BOB.id: len(SEEDS)}


def test_who_fails_its_jobs_loses_to_who_ends_them() -> None:
    pool = (ALICE.candidate(**KNOWN, success_ppm=500_000), BOB.candidate(**KNOWN))
    assert winners(pool) == {BOB.id: len(SEEDS)}


def test_who_is_far_slower_than_the_middle_is_passed_by_and_tried_again_now_and_then() -> None:
    slow = priced(ALICE, 0.01, first_token_us=501_000)
    others = tuple(priced(p, 1.0, first_token_us=200_000, running=1) for p in (BOB, CAROL))
    shares = winners((slow, *others))
    assert 0 < shares[ALICE.id] < len(SEEDS) // 20  # else it could never show that it mended
    assert winners((slow,)) == {ALICE.id: len(SEEDS)}


def test_one_that_claims_an_instant_first_token_has_nobody_passed_by() -> None:
    liar = priced(ALICE, 2.0, first_token_us=1000, success_ppm=0)
    honest = tuple(priced(p, 1.0, first_token_us=600_000) for p in (BOB, CAROL))
    shares = winners((liar, *honest))
    assert shares[BOB.id] + shares[CAROL.id] > len(SEEDS) // 4


def test_a_promise_of_thousands_of_places_is_no_idle_machine() -> None:
    boaster = ALICE.candidate(**KNOWN, concurrency=65_536, running=200, first_token_us=450_000)
    honest = BOB.candidate(**KNOWN, concurrency=8, running=2, first_token_us=50_000)
    assert winners((boaster, honest)) == {BOB.id: len(SEEDS)}


def test_a_new_name_is_no_better_than_a_good_history() -> None:
    new = ALICE.candidate()
    known = tuple(
        p.candidate(**KNOWN, first_token_us=300_000, success_ppm=999_981) for p in (BOB, CAROL)
    )
    assert winners((new, *known))[ALICE.id] < len(SEEDS) // 20


def test_one_failure_long_ago_loses_no_tie() -> None:
    pool = (ALICE.candidate(**KNOWN, success_ppm=999_981), BOB.candidate(**KNOWN))
    assert min(winners(pool).values()) > len(SEEDS) // 3


def test_a_provider_without_a_history_gets_its_part_to_earn_one() -> None:
    new = CROWD[0].candidate(success_ppm=0, first_token_us=480_000, running=7)
    pool = (new, *(p.candidate(**KNOWN, first_token_us=250_000) for p in CROWD[1:]))
    seeds = [hex32(f"explore {index}") for index in range(4000)]
    got = sum(choose(pool, NEED, seed, BALANCED) == new for seed in seeds)
    assert 40 < got < 130  # 20,000 ppm of 4,000 jobs are 80
    told = [one for seed in seeds for one in explain(pool, NEED, seed, BALANCED)]
    assert sum(s.outcome == "won" and s.by == "exploration" for s in told) == got


# ---- the warm set ----


def test_a_conversation_comes_back_to_its_warm_set() -> None:
    pool = tuple(p.candidate(**KNOWN) for p in CROWD)
    seen = {}
    for number in range(8):
        need = replace(NEED, affinity=hex16(f"conversation {number}"))
        shares = winners(pool, need)
        assert len(shares) == BALANCED.warm
        seen[number] = frozenset(shares)
    assert len(set(seen.values())) > 4  # and another conversation to others


def test_one_that_leaves_moves_nobody_s_other_warm_provider() -> None:
    """Rendezvous hashing: of a warm pair the one that stays is still of it."""
    pool = tuple(p.candidate(**KNOWN) for p in CROWD)
    need = replace(NEED, affinity=hex16("conversation"))
    gone, stays = sorted(winners(pool, need))
    left = tuple(c for c in pool if c.provider_id != gone)
    assert stays in winners(left, need)


def test_a_warm_set_that_is_too_full_spills() -> None:
    need = replace(NEED, affinity=hex16("conversation"))
    warm = set(winners(tuple(p.candidate(**KNOWN) for p in CROWD), need))
    full = tuple(
        p.candidate(**KNOWN, running=3 if p.id in warm else 0, concurrency=8) for p in CROWD
    )
    assert not warm & set(winners(full, need))
    busy = tuple(
        p.candidate(**KNOWN, running=2 if p.id in warm else 0, concurrency=8) for p in CROWD
    )
    assert set(winners(busy, need)) == warm


# ---- everybody is told ----

snapshots = st.lists(
    st.builds(
        lambda p, **changes: p.candidate(**changes),
        st.sampled_from(EVERYBODY),
        running=st.integers(0, 3),
        concurrency=st.integers(1, 4),
        first_token_us=st.integers(0, 2_000_000),
        alive=st.booleans(),
        tier=st.sampled_from([None, "simulated", "attested", "open"]),
        tokens_per_s=st.integers(0, 500),
        ended_jobs=st.integers(0, 40),
        success_ppm=st.integers(0, 1_000_000),
    ),
    max_size=15,
    unique_by=lambda c: c.provider_id,
).map(tuple)
needs = st.builds(
    lambda asked, affinity, limits: replace(
        NEED, preferences=asked, affinity=affinity, open_limits=limits
    ),
    st.builds(
        Preferences,
        order=st.sampled_from([(), (ALICE.id,), (BOB.id, CAROL.id)]),
        fallbacks=st.booleans(),
        ignore=st.sampled_from([(), (ALICE.id,)]),
        tiers=st.sampled_from([(), ("attested",), ("open", "attested")]),
        sort=st.sampled_from([None, None, "price", "latency", "throughput"]),
    ),
    st.sampled_from(["", hex16("one"), hex16("two")]),
    st.sampled_from([None, LIMITS]),
)
drawn = st.binary(min_size=32, max_size=32).map(bytes.hex)


@settings(max_examples=300)
@given(snapshots, needs, drawn)
def test_the_explanation_is_of_the_decision_that_was_made(
    pool: tuple[Candidate, ...], need: Need, seed: str
) -> None:
    chosen = choose(pool, need, seed, BALANCED)
    told = explain(pool, need, seed, BALANCED)
    won = [standing.provider_id for standing in told if standing.outcome == "won"]
    assert won == ([chosen.provider_id] if isinstance(chosen, Candidate) else [])
    assert sorted(s.provider_id for s in told) == sorted(c.provider_id for c in pool)
    if isinstance(chosen, Candidate):
        assert chosen.running < chosen.concurrency
        assert chosen.alive


@settings(max_examples=100)
@given(snapshots, needs, drawn, st.randoms(use_true_random=False))
def test_the_order_of_the_snapshot_changes_nothing(
    pool: tuple[Candidate, ...], need: Need, seed: str, shuffle: random.Random
) -> None:
    shuffled = list(pool)
    shuffle.shuffle(shuffled)
    assert choose(tuple(shuffled), need, seed, BALANCED) == choose(pool, need, seed, BALANCED)


def test_a_loser_is_told_what_it_lost_by_and_how_far() -> None:
    dear, cheap = priced(ALICE, 1.0), priced(BOB, 0.5)
    told = {s.provider_id: s for s in explain((dear, cheap), NEED, SEED, BALANCED)}
    assert told[BOB.id].outcome == "won"
    assert (told[ALICE.id].outcome, told[ALICE.id].by) == ("lost", "price")
    assert told[ALICE.id].margin_permille == 250  # 2,500 of a job that may cost 10,000


def test_a_policy_is_named_by_its_hash() -> None:
    assert BALANCED.hash == BALANCED.model_copy().hash
    assert BALANCED.model_copy(update={"warm": 3}).hash != BALANCED.hash


def test_a_policy_says_which_code_reads_it() -> None:
    assert BALANCED.algorithm == 1
    with pytest.raises(ValueError, match="algorithm"):
        MatchingPolicy.model_validate({**BALANCED.model_dump(), "algorithm": 2})
