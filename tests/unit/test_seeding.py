"""A draw follows from a committed secret, the job and its epoch; whoever chose one is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts.commands import CommitMatchingSeed, RequestJob, RevealMatchingSeed
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import EventData, MatchingSeedCommitted, MatchingSeedRevealed
from cocoon.domain import decide as domain
from cocoon.domain.seeding import SeedState, commitment, epoch_of, evolve, seed_of
from cocoon.kernel.errors import Conflict, Forbidden
from services.billing.draws import Draws
from tests.support.example_events import put
from tests.support.job_world import expire_command, hex16, hex32, request_command
from tests.support.model_log import ModelLog

FIRST, SECOND = b"\x01" * 32, b"\x02" * 32
secrets = st.binary(min_size=32, max_size=32)
jobs = st.binary(min_size=16, max_size=16).map(bytes.hex)
epochs = st.integers(1, 2**32 - 1)


def commit(period: int, secret: bytes) -> CommitMatchingSeed:
    return CommitMatchingSeed(shard=1, period=period, commitment=commitment(secret))


def after(*commands: Any) -> SeedState:
    state = SeedState()
    for command in commands:
        for event in domain.decide(state, command):
            state = evolve(state, event)
    return state


@given(secrets, jobs, epochs, secrets, jobs, epochs)
def test_a_seed_is_a_function_of_its_three_parts_and_of_each(
    secret: bytes, job: str, epoch: int, secret2: bytes, job2: str, epoch2: int
) -> None:
    seed = seed_of(secret, job, epoch)
    assert len(bytes.fromhex(seed)) == 32
    same = (secret, job, epoch) == (secret2, job2, epoch2)
    assert (seed_of(secret2, job2, epoch2) == seed) is same


def test_the_formulas_are_those_that_the_documents_publish() -> None:
    """Written out by hand: another implementation finds the same."""
    import hashlib
    import hmac

    job = hex16("job")
    text = b"cocoon matching seed\0" + bytes.fromhex(job) + b"\0\0\0\x02"
    assert seed_of(FIRST, job, 2) == hmac.new(FIRST, text, hashlib.sha256).hexdigest()
    told = hashlib.sha256(b"cocoon matching secret\0" + FIRST).hexdigest()
    assert commitment(FIRST) == told


def test_the_epoch_is_the_one_that_the_command_would_make() -> None:
    assert epoch_of(request_command()) == 1
    assert epoch_of(expire_command(epoch=2)) == 3


def test_periods_begin_one_after_the_other_and_are_revealed_once() -> None:
    reveal = RevealMatchingSeed(shard=1, period=1, secret=FIRST.hex())
    state = after(commit(1, FIRST), commit(2, SECOND))
    assert state == SeedState(2, 2, ((1, commitment(FIRST)), (2, commitment(SECOND))))
    for wrong in (commit(2, SECOND), commit(4, SECOND)):
        with pytest.raises(Conflict):
            domain.decide(state, wrong)
    state = after(commit(1, FIRST), commit(2, SECOND), reveal)
    assert state.open == ((2, commitment(SECOND)),)
    with pytest.raises(Conflict):
        domain.decide(state, reveal)


def test_no_other_secret_can_be_revealed_and_a_lost_one_is_said_to_be_lost() -> None:
    state = after(commit(1, FIRST))
    with pytest.raises(Forbidden):
        domain.decide(state, RevealMatchingSeed(shard=1, period=1, secret=SECOND.hex()))
    (lost,) = domain.decide(state, RevealMatchingSeed(shard=1, period=1, secret=None))
    assert lost == MatchingSeedRevealed(shard=1, period=1, secret=None)


# ---- the audit ----


def log_of(*events: EventData) -> list[StoredEvent]:
    log = ModelLog(1)
    for event in events:
        put(log, "matching/1", [event])
    return log.events


COMMITTED = MatchingSeedCommitted(shard=1, period=1, commitment=commitment(FIRST))
REVEALED = MatchingSeedRevealed(shard=1, period=1, secret=FIRST.hex())
NEXT = MatchingSeedCommitted(shard=1, period=2, commitment=commitment(SECOND))
THIRD = MatchingSeedCommitted(shard=1, period=3, commitment=hex32("third"))


def placed(events: list[StoredEvent], *positions: int) -> list[StoredEvent]:
    return [replace(one, position=at) for one, at in zip(events, positions, strict=True)]


def drawn(period: int = 1, secret: bytes = FIRST, **changes: object) -> RequestJob:
    job = hex16("job")
    fields = {"seed": seed_of(secret, job, 1), "seed_period": period, **changes}
    return request_command(**fields)  # type: ignore[arg-type]


def test_a_seed_that_its_secret_gives_is_right() -> None:
    draws = Draws(placed(log_of(COMMITTED, NEXT, REVEALED), 1, 20, 30))
    assert draws.check(drawn(), 10) is None
    assert (draws.checked, draws.notes(), draws.differences()) == (1, [], [])


def test_the_seed_of_a_later_match_is_checked_with_its_own_epoch() -> None:
    draws = Draws(placed(log_of(COMMITTED, NEXT, REVEALED), 1, 20, 30))
    right = seed_of(FIRST, hex16("job"), 2)
    assert draws.check(expire_command(seed=right, seed_period=1), 10) is None
    assert draws.check(expire_command(seed=seed_of(FIRST, hex16("job"), 1), seed_period=1), 11)


@pytest.mark.parametrize(
    ("command", "position", "told"),
    [
        (drawn(seed=hex32("chosen")), 10, "its seed is not the one that its secret gives"),
        (drawn(seed_period=0), 10, "its seed comes from no secret, though there are some"),
        (drawn(), 3, "the secret of its seed was not committed to before"),
        (drawn(9), 10, "the secret of its seed was not committed to before"),
        (drawn(), 35, "the period of its seed was over"),
    ],
)
def test_a_seed_that_was_chosen_is_found(command: RequestJob, position: int, told: str) -> None:
    draws = Draws(placed(log_of(COMMITTED, NEXT, REVEALED), 5, 20, 30))
    assert draws.check(command, position) == f"position {position}: {told}"


def test_only_the_newest_secret_and_the_one_before_may_be_drawn_from() -> None:
    draws = Draws(placed(log_of(COMMITTED, NEXT, THIRD, REVEALED), 1, 20, 30, 40))
    assert draws.check(drawn(), 25) is None
    assert draws.notes() == ["seeds of the secret before the newest one: 1"]
    assert draws.check(drawn(), 35) == "position 35: the period of its seed was over"


def test_commands_from_before_there_were_secrets_are_not_blamed() -> None:
    assert Draws([]).check(request_command(), 10) is None
    assert Draws(placed(log_of(COMMITTED), 20)).check(request_command(), 10) is None


def test_what_cannot_be_checked_is_counted_and_said() -> None:
    draws = Draws(placed(log_of(COMMITTED), 1))
    assert draws.check(drawn(seed=hex32("unknown")), 10) is None
    assert draws.notes() == ["seeds of a secret that is not revealed yet: 1"]
    lost = MatchingSeedRevealed(shard=1, period=1, secret=None)
    draws = Draws(placed(log_of(COMMITTED, NEXT, lost), 1, 20, 30))
    assert draws.check(drawn(seed=hex32("unknown")), 10) is None
    assert draws.notes() == ["seeds of a secret that was lost, which nobody can check: 1"]
    assert draws.checked == 0


def test_a_reveal_of_what_was_not_committed_to_is_a_difference() -> None:
    other = REVEALED.model_copy(update={"secret": SECOND.hex()})
    draws = Draws(placed(log_of(COMMITTED, NEXT, other), 1, 20, 30))
    assert draws.differences() == ["position 30: reveals what was not committed to"]


def test_a_secret_that_is_kept_back_long_after_its_period_is_told_apart() -> None:
    draws = Draws(placed(log_of(COMMITTED, NEXT, THIRD), 1, 20, 30))
    assert draws.check(drawn(seed=hex32("unknown")), 10) is None
    assert draws.check(drawn(2, SECOND), 25) is None
    assert draws.notes() == [
        "seeds of a secret that is not revealed yet: 1",
        "seeds of a secret that is kept back though two newer ones came: 1",
    ]


def test_a_secret_that_is_committed_to_again_is_a_difference() -> None:
    again = NEXT.model_copy(update={"commitment": COMMITTED.commitment})
    draws = Draws(placed(log_of(COMMITTED, again), 1, 20))
    assert draws.differences() == ["position 20: commits to a secret of an earlier period"]
