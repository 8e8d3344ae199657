"""The gateway's account of bytes in memory: no bound is passed and nothing stays behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import RateLimited
from services.gateway.budget import ByteBudget

KEYS = ("key_a", "key_b", "key_c")


def test_a_key_takes_no_more_than_its_part() -> None:
    budget = ByteBudget(100, 60)
    first, second, other = budget.share("key_a"), budget.share("key_a"), budget.share("key_b")
    first.need(40)
    assert second.take(20)
    assert not second.take(1)
    with pytest.raises(RateLimited) as refused:
        second.need(1)
    assert refused.value.code == "too_many_bytes"
    assert refused.value.retry_after_s
    other.need(40)
    with pytest.raises(RateLimited) as refused:
        other.need(1)
    assert refused.value.code == "gateway_full"
    first.give_back()
    other.need(1)
    assert budget.used_bytes == 61


def test_a_refused_need_and_a_check_take_nothing() -> None:
    budget = ByteBudget(10, 10)
    share = budget.share("key_a")
    share.check(10)
    with pytest.raises(RateLimited):
        share.need(11)
    assert budget.used_bytes == share.used_bytes == 0


def test_keep_gives_back_the_rest_and_never_takes() -> None:
    budget = ByteBudget(10, 10)
    share = budget.share("key_a")
    share.need(8)
    share.keep(9)
    assert share.used_bytes == 8
    share.keep(3)
    assert budget.used_bytes == 3


def test_a_closed_share_takes_nothing_and_closes_once() -> None:
    budget = ByteBudget(10, 10)
    share, other = budget.share("key_a"), budget.share("key_a")
    share.need(5)
    share.give_back()
    share.give_back()
    assert budget.keys == 1
    assert not share.take(1)
    other.give_back()
    assert (budget.used_bytes, budget.keys) == (0, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("open", "take", "need", "keep", "close")),
        st.integers(0, 7),
        st.integers(0, 50),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_no_history_passes_a_bound_or_leaves_bytes_behind(
    steps: list[tuple[str, int, int]],
) -> None:
    budget = ByteBudget(100, 40)
    shares = [(key, budget.share(key)) for key in KEYS]
    for what, which, size in steps:
        key, share = shares[which % len(shares)]
        before = budget.used_bytes
        if what == "open":
            shares.append((KEYS[which % 3], budget.share(KEYS[which % 3])))
        elif what == "take":
            taken = share.take(size)
            assert budget.used_bytes == before + (size if taken else 0)
        elif what == "need":
            try:
                share.need(size)
            except RateLimited:
                assert budget.used_bytes == before
        elif what == "keep":
            share.keep(size)
        else:
            share.give_back()
        assert budget.used_bytes == sum(share.used_bytes for _, share in shares) <= 100
        for key in KEYS:
            assert sum(share.used_bytes for k, share in shares if k == key) <= 40
    for _, share in shares:
        share.give_back()
    assert (budget.used_bytes, budget.keys) == (0, 0)
