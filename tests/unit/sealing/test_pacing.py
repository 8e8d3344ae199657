"""The four padding profiles' schedulers: pure, with time as an argument."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.sealing import Pace, Profile, Step, public_count
from cocoon.sealing.pacing import NEVER, TICK_FRAME_BYTES
from cocoon.sealing.padding import default_profile, is_public_count

START = 1000


def ask(pace: Pace, now_ms: int, **waiting: int | bool) -> Step:
    have = {"tokens_waiting": 0, "bytes_waiting": 0, "sealed_bytes": 0, "ended": False, **waiting}
    return pace.step(now_ms, **have)  # type: ignore[arg-type]


def test_p0_says_nothing_before_the_end() -> None:
    pace = Pace(Profile.P0, opened_ms=START)
    step = ask(pace, START + 60_000, tokens_waiting=500, bytes_waiting=9000, sealed_bytes=700)
    assert step == Step(wake_tokens=NEVER)  # not one token of the whole answer wakes it
    assert ask(pace, START + 60_001, bytes_waiting=9000, ended=True) == Step(
        seal=True, send_bytes=None
    )
    assert ask(pace, START + 60_002, sealed_bytes=9000, ended=True).finish


def test_p2_sends_the_first_token_at_once_and_then_waits_for_eight_or_100_ms() -> None:
    pace = Pace(Profile.P2, opened_ms=START)
    assert ask(pace, START) == Step()
    assert ask(pace, START + 5, tokens_waiting=1, bytes_waiting=4).seal
    assert ask(pace, START + 6, tokens_waiting=7, bytes_waiting=30) == Step(
        wake_ms=START + 105, wake_tokens=8
    )
    assert ask(pace, START + 7, tokens_waiting=8, bytes_waiting=33).seal
    assert not ask(pace, START + 106, tokens_waiting=1, bytes_waiting=3).seal
    assert ask(pace, START + 107, tokens_waiting=1, bytes_waiting=3).seal
    assert ask(pace, START + 108, tokens_waiting=1, bytes_waiting=3, ended=True).seal
    assert ask(pace, START + 108, ended=True).finish


def test_p3_sends_everything_as_it_comes() -> None:
    pace = Pace(Profile.P3, opened_ms=START)
    for now_ms in range(START, START + 5):
        assert ask(pace, now_ms, tokens_waiting=1, bytes_waiting=1) == Step(
            seal=True, send_bytes=None
        )
    assert ask(pace, START + 9) == Step()
    assert ask(pace, START + 9, ended=True).finish


def test_p2_lets_already_sealed_bytes_go() -> None:
    assert ask(Pace(Profile.P2, opened_ms=START), START, sealed_bytes=10).send_bytes is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 900)), max_size=12),
    st.integers(0, 6000),
    st.integers(1, 250),
)
def test_p1_looks_the_same_whatever_is_said(
    arrivals: list[tuple[int, int]], end_ms: int, poll_ms: int
) -> None:
    """One frame each 100 ms from the start, and an end only at multiples of 16 frames."""
    pace = Pace(Profile.P1, opened_ms=0)
    waiting = sealed = 0
    sent_at: list[int] = []
    now, arrivals = 0, sorted(arrivals)
    total_frames = -(-sum(size for _, size in arrivals) // 253)
    while True:
        while arrivals and arrivals[0][0] <= now:
            waiting += arrivals.pop(0)[1]
        step = pace.step(
            now, tokens_waiting=0, bytes_waiting=waiting, sealed_bytes=sealed,
            ended=now >= end_ms and not arrivals,
        )  # fmt: skip
        if step.finish:
            break
        if step.seal:
            sealed += -(-waiting // 253) * TICK_FRAME_BYTES
            waiting = 0
        if step.pad:
            sealed += TICK_FRAME_BYTES
        if step.send_bytes:
            assert step.send_bytes == TICK_FRAME_BYTES <= sealed
            sealed -= TICK_FRAME_BYTES
            sent_at.append(now)
        else:
            assert step.wake_ms is not None
            now = min(step.wake_ms, now + poll_ms)
        assert len(sent_at) < 1000
    assert len(sent_at) % 16 == 0
    assert len(sent_at) >= max(total_frames, 16)
    for count, moment in enumerate(sent_at, start=1):
        assert count * 100 <= moment < count * 100 + poll_ms + 1


def test_p1_that_was_held_up_catches_up_frame_by_frame() -> None:
    pace = Pace(Profile.P1, opened_ms=0)
    late = [ask(pace, 350) for _ in range(4)]
    assert [step.send_bytes for step in late] == [277, 277, 277, 0]
    assert late[-1].wake_ms == 400


def test_p1_says_at_each_tick_what_to_seal_to_send_and_when_to_come_again() -> None:
    pace = Pace(Profile.P1, opened_ms=0)

    def tick(due_ms: int, *, seal: bool = False, pad: bool = False) -> Step:
        return Step(
            seal=seal, pad=pad, send_bytes=277, wake_ms=due_ms + 100, wake_tokens=NEVER
        )  # fmt: skip

    assert ask(pace, 99, tokens_waiting=9, bytes_waiting=40) == Step(wake_ms=100, wake_tokens=NEVER)
    assert ask(pace, 100) == tick(100, pad=True)
    assert ask(pace, 200, bytes_waiting=1) == tick(200, seal=True)
    assert ask(pace, 300, tokens_waiting=1) == tick(300, seal=True)
    assert ask(pace, 400, sealed_bytes=1) == tick(400)
    assert ask(pace, 500, tokens_waiting=5, sealed_bytes=554) == tick(500)


@pytest.mark.parametrize("waiting", [{"tokens_waiting": 1}, {"bytes_waiting": 1}])
def test_one_token_or_one_byte_is_something_to_say(waiting: dict[str, int]) -> None:
    pace = Pace(Profile.P3, opened_ms=START)
    assert ask(pace, START, **waiting) == Step(seal=True, send_bytes=None)
    assert ask(pace, START, ended=True, **waiting) == Step(seal=True, send_bytes=None)
    assert ask(pace, START, ended=True) == Step(send_bytes=None, finish=True)


def test_default_profiles() -> None:
    assert default_profile(stream=True) is Profile.P2
    assert default_profile(stream=False) is Profile.P0


@pytest.mark.parametrize("profile", list(Profile))
@given(bound=st.integers(0, 5000), data=st.data())
def test_a_public_count_never_undercounts_and_fits_its_bound(
    profile: Profile, bound: int, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(0, bound))
    shown = public_count(profile, tokens, bound)
    assert tokens <= shown <= bound
    assert is_public_count(profile, shown, bound)
    if profile in (Profile.P2, Profile.P3):
        assert shown == tokens
