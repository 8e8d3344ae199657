"""Room for early results: bounded by provider and over all, given back with time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.early import MAX_OF_ALL, MAX_OF_ONE, EarlyResults, has_room


def fill(early: EarlyResults, provider: str, count: int, now_s: float = 0.0) -> int:
    """How many of `count` results of a provider were let in."""
    return sum(early.admit(provider, f"{provider}-{n}", 1, now_s) for n in range(count))


def test_one_provider_has_its_bound_and_another_its_own() -> None:
    early = EarlyResults(wait_s=15)
    assert fill(early, "liar", 5000) == MAX_OF_ONE
    assert fill(early, "honest", 5) == 5


def test_all_together_leave_most_of_the_window_free() -> None:
    early = EarlyResults(wait_s=15)
    assert sum(fill(early, f"p{n}", MAX_OF_ONE) for n in range(100)) == MAX_OF_ALL
    assert not has_room(0, MAX_OF_ALL)
    assert MAX_OF_ALL * 4 <= 4096  # ingress_durable's max_ack_pending


def test_room_comes_back_when_they_are_decided_or_too_old() -> None:
    early = EarlyResults(wait_s=15)
    fill(early, "p", MAX_OF_ONE)
    assert not early.admit("p", "new", 1, 1.0)
    early.forget("p", "p-0", 1)
    assert early.admit("p", "new", 1, 1.0)
    assert not early.admit("p", "newer", 1, 14.9)
    assert early.admit("p", "newer", 1, 15.0)
    assert len(early) == 2


def test_the_room_of_silent_providers_comes_back_to_others() -> None:
    early = EarlyResults(wait_s=15)
    for n in range(MAX_OF_ALL // MAX_OF_ONE):
        fill(early, f"p{n}", MAX_OF_ONE)
    assert not early.admit("late", "job", 1, 14.9)
    assert early.admit("late", "job", 1, 15.0)


_DECIDED = st.booleans()


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.booleans(), st.integers(0, 40)))
)
def test_the_bounds_hold_whatever_comes(steps: list[tuple[int, int, bool, int]]) -> None:
    early, now_s = EarlyResults(wait_s=15), 0.0
    for provider, job, decided, later in steps:
        now_s += later / 10
        if decided:
            early.forget(f"p{provider}", f"j{job}", 1)
        else:
            early.admit(f"p{provider}", f"j{job}", 1, now_s)
        assert len(early) <= MAX_OF_ALL
        assert all(len(mine) <= MAX_OF_ONE for mine in early._until_s.values())
