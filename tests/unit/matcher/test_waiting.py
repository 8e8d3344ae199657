"""The waiting room is bounded and fair, and knows each job once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cocoon.contracts.matching import Preferences, Priority
from cocoon.kernel.errors import RateLimited
from services.matcher.waiting import TURNS, Waiting, WaitingRoom
from tests.support.job_world import hex16, job_request

BUSY = RateLimited("busy")


def waiting(
    account: str, job: str, deadline_s: float = 10.0, priority: Priority = "normal"
) -> Waiting:
    wishes = None if priority == "normal" else Preferences(priority=priority)
    return Waiting(job_request(job, account=account, preferences=wishes), "", deadline_s, BUSY)


def room(*names: str, limit: int = 100, per_account: int = 50) -> WaitingRoom:
    """Names like "a1": account a, job a1."""
    made = WaitingRoom(limit, per_account)
    for name in names:
        assert made.add(waiting(name[0], name))
    return made


def turns(made: WaitingRoom) -> list[str]:
    known = {hex16(f"{a}{n}"): f"{a}{n}" for a in "abc" for n in range(10)}
    return [known[w.request.job_id] for w in made.in_turn()]


def test_accounts_take_turns_and_each_keeps_its_own_order() -> None:
    assert turns(room("a1", "a2", "a3", "b1", "c1", "c2")) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_an_account_that_had_its_turn_comes_last() -> None:
    made = room("a1", "a2", "b1", "c1")
    assert made.take(hex16("a1"))
    assert turns(made) == ["b1", "c1", "a2"]


def test_a_turn_in_vain_costs_the_request_its_place_in_no_queue() -> None:
    made = room("a1", "a2", "b1")
    assert made.take(hex16("a1"))
    assert made.add(waiting("a", "a1"), first=True)
    assert turns(made) == ["b1", "a1", "a2"]


# ---- priorities ----


def lined_up(**lines: int) -> WaitingRoom:
    """So many jobs of each priority, all of account a: a0.. flex, a3.. normal, a6.. priority."""
    made = WaitingRoom(100, 100)
    for name, first in (("flex", 0), ("normal", 3), ("priority", 6)):
        for number in range(first, first + lines.get(name, 0)):
            assert made.add(waiting("a", f"a{number}", priority=name))  # type: ignore[arg-type]
    return made


def test_a_job_of_priority_comes_first_among_its_own_account_s() -> None:
    assert turns(lined_up(flex=2, normal=2, priority=2)) == ["a6", "a3", "a7", "a4", "a0", "a1"]


def test_flex_has_its_turn_though_better_ones_never_end() -> None:
    made = lined_up(flex=1)
    served = []
    for number in range(20):
        made.add(waiting("a", f"b{number % 10}", priority="priority"))
        first = made.in_turn()[0].request.job_id
        made.take(first)
        served.append(first)
        if first == hex16("a0"):
            break
    assert served.index(hex16("a0")) == TURNS.index("flex")


def test_a_priority_takes_no_other_account_s_turn() -> None:
    made = WaitingRoom(100, 100)
    for name, priority in (("b1", "flex"), ("a1", "priority"), ("a2", "priority"), ("b2", "flex")):
        made.add(waiting(name[0], name, priority=priority))  # type: ignore[arg-type]
    assert turns(made) == ["b1", "a1", "b2", "a2"]


def test_who_waits_alone_waits_for_nobody_s_turn() -> None:
    assert turns(lined_up(flex=3)) == ["a0", "a1", "a2"]


@given(st.lists(st.sampled_from(["flex", "normal", "priority"]), max_size=9), st.integers(0, 8))
def test_within_one_priority_the_first_comes_first_and_all_come(
    asked: list[Priority], taken: int
) -> None:
    made = WaitingRoom(100, 100)
    for number, priority in enumerate(asked):
        made.add(waiting("a", f"a{number}", priority=priority))
    for _ in range(min(taken, len(asked))):
        made.take(made.in_turn()[0].request.job_id)
    left = turns(made)
    assert len(left) == len(made) == len(asked) - min(taken, len(asked))
    for priority in ("flex", "normal", "priority"):
        own = [name for name in left if asked[int(name[1:])] == priority]
        assert own == sorted(own)


def test_the_room_is_bounded_and_so_is_one_accounts_part() -> None:
    made = room("a1", "a2", limit=3, per_account=2)
    assert not made.add(waiting("a", "a3"))
    assert made.add(waiting("b", "b1"))
    assert not made.add(waiting("c", "c1"))
    assert len(made) == 3


def test_a_repeated_request_waits_once_and_keeps_its_deadline() -> None:
    made = room("a1")
    assert made.add(waiting("a", "a1", deadline_s=99.0))
    assert len(made) == 1
    assert [w.deadline_s for w in made.in_turn()] == [10.0]


def test_another_request_under_the_same_job_id_is_not_taken() -> None:
    assert not room("a1").add(waiting("b", "a1"))


def test_a_cancelled_job_leaves_and_cannot_leave_twice() -> None:
    made = room("a1", "b1")
    assert made.remove(hex16("a1"))
    assert not made.remove(hex16("a1"))
    assert not made.take(hex16("a1"))
    assert turns(made) == ["b1"]


def test_who_waited_past_the_deadline_is_taken_out() -> None:
    made = WaitingRoom(10, 10)
    made.add(waiting("a", "a1", deadline_s=5.0))
    made.add(waiting("a", "a2", deadline_s=6.0))
    assert [w.request.job_id for w in made.expired(5.0)] == [hex16("a1")]
    assert turns(made) == ["a2"]


class Room(RuleBasedStateMachine):
    """Whatever happens, sizes agree and nobody is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.room = WaitingRoom(limit=6, limit_per_account=3)
        self.model: dict[str, str] = {}

    @rule(
        account=st.sampled_from("abc"),
        number=st.integers(0, 9),
        priority=st.sampled_from(["flex", "normal", "priority"]),
    )
    def add(self, account: str, number: int, priority: Priority) -> None:
        job = f"{account}{number}"
        per_account = sum(a == account for a in self.model.values())
        fits = job in self.model or (len(self.model) < 6 and per_account < 3)
        assert self.room.add(waiting(account, job, priority=priority)) == fits
        if fits:
            self.model[job] = account

    @rule(account=st.sampled_from("abc"), number=st.integers(0, 9), turn=st.booleans())
    def leave(self, account: str, number: int, turn: bool) -> None:
        job = f"{account}{number}"
        leave = self.room.take if turn else self.room.remove
        assert leave(hex16(job)) == (self.model.pop(job, None) is not None)

    @invariant()
    def everybody_has_a_turn(self) -> None:
        assert sorted(turns(self.room)) == sorted(self.model)
        assert len(self.room) == len(self.model)


Room.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestRoom = Room.TestCase
