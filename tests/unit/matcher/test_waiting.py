"""The waiting room is bounded and fair, and knows each job once."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cocoon.kernel.errors import RateLimited
from services.matcher.waiting import Waiting, WaitingRoom
from tests.support.job_world import hex16, job_request

BUSY = RateLimited("busy")


def waiting(account: str, job: str, deadline_s: float = 10.0) -> Waiting:
    return Waiting(job_request(job, account=account), "", deadline_s, BUSY)


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

    @rule(account=st.sampled_from("abc"), number=st.integers(0, 9))
    def add(self, account: str, number: int) -> None:
        job = f"{account}{number}"
        per_account = sum(a == account for a in self.model.values())
        fits = job in self.model or (len(self.model) < 6 and per_account < 3)
        assert self.room.add(waiting(account, job)) == fits
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
