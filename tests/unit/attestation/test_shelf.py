"""The shelf of manifests: bounded, and what somebody offers is never dropped for another."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import RateLimited
from services.attestation.shelf import Kept, Limits, Shelf

LIMITS = Limits(in_all=4, per_provider=2, size_bytes=100)
PROVIDERS = ("alice", "bob", "carol")


def kept(by: str = "alice", offered_ms: int = 0, size_bytes: int = 10) -> Kept:
    return Kept(size_bytes, "chat", "int8", by, offered_ms)


def shelf(**held: Kept) -> Shelf:
    made = Shelf()
    made.load(held)
    return made


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PROVIDERS),
            st.integers(1, 60),
            st.sets(st.integers(0, 29), max_size=6),
        ),
        max_size=30,
    )
)
def test_whatever_is_published_the_limits_hold_and_the_offered_stay(
    publications: list[tuple[str, int, set[int]]],
) -> None:
    made, held = Shelf(), dict[str, Kept]()
    for number, (who, size, offered) in enumerate(publications):
        wanted = {f"m{one}" for one in offered}
        try:
            gone = made.make_room(who, size, LIMITS, wanted.copy)
        except RateLimited:
            # nothing that could have gone would have made the room
            left = [one for name, one in held.items() if name in wanted]
            mine = [one for one in left if one.published_by == who]
            assert (
                len(mine) >= LIMITS.per_provider
                or len(left) >= LIMITS.in_all
                or sum(one.size_bytes for one in left) + size > LIMITS.size_bytes
            )
            continue
        assert not wanted & set(gone)
        assert set(gone) <= set(held)
        made.drop(gone)
        for name in gone:
            del held[name]
        held[f"m{number}"] = kept(who, number, size)
        made.put(f"m{number}", held[f"m{number}"])
        assert len(made) == len(held) <= LIMITS.in_all
        assert sum(one.size_bytes for one in held.values()) <= LIMITS.size_bytes
        assert sum(1 for one in held.values() if one.published_by == who) <= LIMITS.per_provider


def test_what_was_offered_last_the_longest_ago_goes_first() -> None:
    full = shelf(new=kept("bob", 9), old=kept("bob", 1), mid=kept("carol", 5), own=kept("alice", 7))
    assert full.make_room("alice", 10, LIMITS, set) == ["old"]
    assert full.make_room("alice", 10, LIMITS, lambda: {"old"}) == ["mid"]
    full.offered(["old", "unknown"], 20)
    assert full.make_room("alice", 10, LIMITS, set) == ["mid"]


def test_a_provider_at_its_own_limit_gives_up_its_own_and_nobody_elses() -> None:
    two = shelf(a1=kept("alice", 5), a2=kept("alice", 6), b=kept("bob", 1))
    assert two.make_room("alice", 10, LIMITS, set) == ["a1"]
    with pytest.raises(RateLimited, match="offer fewer models"):
        two.make_room("alice", 10, LIMITS, lambda: {"a1", "a2"})
    assert two.make_room("bob", 10, LIMITS, lambda: {"a1", "a2"}) == []


def test_a_shelf_full_of_what_is_offered_refuses_and_says_that_the_model_is_served() -> None:
    full = shelf(**{f"m{n}": kept(PROVIDERS[n % 3]) for n in range(4)})
    with pytest.raises(RateLimited, match="served all the same"):
        full.make_room("bob", 10, LIMITS, lambda: {"m0", "m1", "m2", "m3"})
    with pytest.raises(RateLimited):
        shelf(a=kept("alice", 0, 95)).make_room("bob", 10, LIMITS, lambda: {"a"})


def test_only_what_nobody_offers_and_nobody_has_for_long_is_stale() -> None:
    made = shelf(old=kept(offered_ms=1), offered=kept(offered_ms=1), young=kept(offered_ms=50))
    assert made.stale(50, {"offered"}) == ["old"]
    assert made.lacking(["old", "x"]) == ["x"]
