"""The machine of one job: nothing before the commit, bytes in order and once, one end."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.contracts.messages import ErrorBody
from cocoon.kernel.errors import CocoonError, Conflict, DeadlineExceeded, Unavailable
from services.gateway.actions import (
    Abandon,
    Action,
    Ask,
    CancelAtMatcher,
    CancelAtProvider,
    Dispatch,
    Fail,
    Fetch,
    Finish,
    Frame,
    LogView,
    Lookup,
    Match,
    Report,
    Send,
    Start,
    Timing,
)  # fmt: skip
from services.gateway.decide import Relay, client_error

RESPONSE = bytes(range(256)) * 3
BLOB = hashlib.sha256(RESPONSE).digest()
TIMING = Timing()


def match(epoch: int = 1, provider: str = "prov_a") -> Match:
    return Match(epoch, provider, "{}", "q" * 64, "e" * 64)


def relay(
    *, stream: bool = True, attached: bool = False, buffer_limit: int = 1 << 20,
    not_after_in_ms: int = 60_000,
) -> Relay:  # fmt: skip
    return Relay(
        stream=stream, attached=attached, timing=TIMING, buffer_limit=buffer_limit,
        not_after_in_ms=not_after_in_ms, now_ms=0,
    )  # fmt: skip


def frame(start: int, end: int, epoch: int = 1, provider: str = "prov_a") -> Frame:
    return Frame(provider, epoch, start, RESPONSE[start:end])


def last(start: int, epoch: int = 1, provider: str = "prov_a") -> Frame:
    return Frame(provider, epoch, start, RESPONSE[start:], True, len(RESPONSE), BLOB)


def sent(actions: list[Action]) -> bytes:
    return b"".join(a.data for a in actions if isinstance(a, Send))


def kinds(actions: list[Action]) -> list[str]:
    return [type(a).__name__ for a in actions]


def matched_and_committed(machine: Relay) -> None:
    machine.begin()
    machine.on_matched(match(), 0)
    machine.on_committed(1)


def failure(actions: list[Action]) -> CocoonError:
    fails = [a for a in actions if isinstance(a, Fail)]
    assert len(fails) == 1
    return fails[0].error


def test_a_stream_is_relayed_as_it_comes_and_began_is_reported_once() -> None:
    machine = relay()
    assert machine.begin() == [Ask()]
    assert machine.on_matched(match(), 1) == [Dispatch(match())]
    assert machine.on_committed(1) == []
    first = machine.on_frame(frame(0, 10), 2)
    assert kinds(first) == ["Start", "Report", "Send"]
    assert first[0] == Start(match(), None)
    assert kinds(machine.on_frame(frame(10, 20), 3)) == ["Send"]
    assert kinds(machine.on_frame(last(20), 4)) == ["Send", "Finish"]
    assert machine.done


def test_the_first_byte_waits_for_the_commit_of_its_own_epoch() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_frame(frame(0, 10), 1) == []
    machine.on_matched(match(2, "prov_b"), 2)
    assert machine.on_committed(1) == []
    assert machine.on_frame(frame(0, 7, 2, "prov_b"), 3) == []
    assert sent(machine.on_committed(2)) == RESPONSE[:7]


def test_a_whole_body_goes_out_at_the_end_with_its_length() -> None:
    machine = relay(stream=False)
    matched_and_committed(machine)
    assert machine.on_frame(frame(0, 100), 1) == []
    actions = machine.on_frame(last(100), 2)
    assert actions[0] == Start(match(), len(RESPONSE))
    assert sent(actions) == RESPONSE
    assert kinds(actions)[-1] == "Finish"


def test_a_lost_provider_before_the_first_byte_is_replaced_unseen() -> None:
    machine = relay(stream=False)
    matched_and_committed(machine)
    machine.on_frame(frame(0, 300), 1)
    actions = machine.on_matched(match(2, "prov_b"), 2)
    assert actions == [CancelAtProvider("prov_a", 1), Dispatch(match(2, "prov_b"))]
    machine.on_committed(2)
    assert machine.on_frame(last(0), 3) == []  # the old provider's
    assert sent(machine.on_frame(last(0, 2, "prov_b"), 4)) == RESPONSE


def test_a_lost_provider_after_the_first_byte_truncates_and_cancels() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 1)
    actions = machine.on_matched(match(2, "prov_b"), 2)
    assert kinds(actions) == ["CancelAtProvider", "CancelAtMatcher", "Fail"]
    assert actions[-1].truncated  # type: ignore[union-attr]
    assert machine.on_frame(frame(0, 10, 2, "prov_b"), 3) == []


def test_a_repeated_match_changes_nothing() -> None:
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_matched(match(), 1) == []
    machine.on_frame(frame(0, 10), 2)
    assert machine.on_matched(match(), 3) == []
    assert sent(machine.on_frame(last(10), 4)) == RESPONSE[10:]


def test_a_gap_is_filled_from_sealed_up_to_the_last_byte() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 1)
    assert machine.on_frame(frame(20, 30), 2) == []
    assert machine.on_frame(last(30), 3) == [Fetch(match(), BLOB, 10, len(RESPONSE))]
    assert machine.on_frame(frame(10, 20), 4) == []  # too late: SEALED has it
    assert sent(machine.on_filled(RESPONSE[10:400])) == RESPONSE[10:400]
    assert kinds(machine.on_filled(RESPONSE[400:] + b"more")) == ["Send", "Finish"]


def test_bytes_beyond_the_buffer_come_from_sealed() -> None:
    machine = relay(stream=False, buffer_limit=100)
    matched_and_committed(machine)
    machine.on_frame(frame(0, 90), 1)
    machine.on_frame(frame(90, 300), 2)
    assert machine.on_frame(last(300), 3) == [Fetch(match(), BLOB, 90, len(RESPONSE))]
    actions = machine.on_filled(RESPONSE[90:])
    assert actions[0] == Start(match(), len(RESPONSE))
    assert sent(actions) == RESPONSE


def test_a_response_missing_from_sealed_ends_in_an_error() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(last(5), 1)
    actions = machine.on_fill_ended()
    assert failure(actions).code == "response_lost"
    assert machine.on_fill_ended() == []


@pytest.mark.parametrize("outcome", ["busy", "refused", "silent"])
def test_a_dispatch_that_fails_is_reported(outcome: Any) -> None:
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_dispatch(1, outcome, "busy") == [Report(1, outcome, "busy")]
    assert machine.on_dispatch(2, outcome, "busy") == []


def test_a_silent_provider_whose_bytes_have_come_is_not_reported() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 1), 1)
    assert machine.on_dispatch(1, "silent", "none") == []


@pytest.mark.parametrize(
    "code", ["unknown_key", "no_provider_recipient", "no_provider_attestation"]
)
def test_outdated_sealing_is_answered_with_reseal(code: str) -> None:
    error = client_error(ErrorBody(status=503, code=code, message="x"))
    assert isinstance(error, Conflict)
    assert error.code == "reseal"


def test_what_the_provider_said_outweighs_what_the_matcher_concludes() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_dispatch(1, "refused", "unknown_key")
    actions = machine.on_ended(ErrorBody(status=503, code="attempts_exhausted", message="x"))
    assert failure(actions).code == "reseal"


def test_the_matcher_is_asked_twice_and_then_given_up() -> None:
    machine = relay()
    machine.begin()
    assert machine.wake_at_ms == TIMING.repeat_ask_ms
    assert machine.on_time(TIMING.repeat_ask_ms) == [Ask()]
    assert machine.on_time(TIMING.repeat_ask_ms + 1) == []
    actions = machine.on_time(TIMING.match_timeout_ms)
    assert actions[0] == CancelAtMatcher(0)
    assert isinstance(failure(actions), Unavailable)


def test_a_queued_request_waits_until_its_not_after() -> None:
    machine = relay(not_after_in_ms=9_000)
    machine.begin()
    assert machine.on_waiting(0) == []
    assert machine.on_time(4_999) == []
    assert machine.on_waiting(4_999) == []
    assert machine.on_time(8_999) == []
    assert isinstance(failure(machine.on_time(9_000)), DeadlineExceeded)


def test_no_first_byte_until_not_after_is_a_timeout_that_cancels() -> None:
    machine = relay(not_after_in_ms=5_000)
    matched_and_committed(machine)
    assert Lookup() in machine.on_time(TIMING.stall_ms)
    actions = machine.on_time(5_000)
    assert kinds(actions) == ["CancelAtMatcher", "CancelAtProvider", "Fail"]
    assert isinstance(failure(actions), DeadlineExceeded)


def test_a_client_that_leaves_cancels_everywhere() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 3), 1)
    assert machine.on_disconnect() == [CancelAtMatcher(1), CancelAtProvider("prov_a", 1), Abandon()]
    assert machine.on_disconnect() == []


def test_a_repeat_neither_reports_nor_cancels_the_first_run() -> None:
    machine = relay()
    machine.begin()
    assert machine.on_existing(same_request=True) == [Lookup()]
    assert machine.on_log(LogView(match()), 1) == [Dispatch(match())]
    assert machine.on_dispatch(1, "busy", "busy") == []
    assert machine.on_disconnect() == [Abandon()]


def test_a_repeat_of_a_settled_job_is_read_from_sealed() -> None:
    machine = relay()
    machine.begin()
    machine.on_existing(same_request=True)
    actions = machine.on_log(LogView(match(2, "prov_b"), None, BLOB, len(RESPONSE)), 1)
    assert actions == [Fetch(match(2, "prov_b"), BLOB, 0, len(RESPONSE))]
    actions = machine.on_filled(RESPONSE)
    assert kinds(actions) == ["Start", "Send", "Finish"]


def test_another_request_under_the_same_key_is_a_mismatch() -> None:
    machine = relay()
    machine.begin()
    assert failure(machine.on_existing(same_request=False)).code == "idempotency_mismatch"


def test_a_lost_last_frame_is_found_in_the_log() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 10)
    assert machine.on_time(10 + TIMING.stall_ms) == [Lookup()]
    actions = machine.on_log(LogView(match(), None, BLOB, len(RESPONSE)), 3_000)
    assert actions == [Fetch(match(), BLOB, 10, len(RESPONSE))]


def test_a_lost_commit_is_found_in_the_log() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_frame(last(0), 1) == []
    assert sent(machine.on_log(LogView(match()), 2_000)) == RESPONSE


def test_a_missed_new_match_is_found_in_the_log_and_dispatched() -> None:
    machine = relay()
    matched_and_committed(machine)
    actions = machine.on_log(LogView(match(2, "prov_b")), 2_000)
    assert Dispatch(match(2, "prov_b")) in actions
    assert sent(machine.on_frame(last(0, 2, "prov_b"), 2_001)) == RESPONSE


def test_a_match_that_was_never_committed_is_asked_for_again() -> None:
    """The matcher died, or was fenced, between the announcement and its commit."""
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    machine.on_frame(frame(0, 10), 1)
    assert machine.on_time(1 + TIMING.stall_ms) == [Lookup()]
    assert machine.on_log(LogView(None, absent=True), 2_001) == [Ask()]
    assert sent(machine.on_committed(1, "prov_a")) == RESPONSE[:10]


def test_a_log_that_cannot_be_read_is_no_reason_to_ask_again() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_log(LogView(None), 2_001) == []


def test_of_two_announced_matches_the_committed_one_counts() -> None:
    """A fenced matcher's announcement came first; its successor's match is in the log."""
    machine = relay()
    machine.begin()
    machine.on_matched(match(1, "prov_a"), 0)
    assert machine.on_matched(match(1, "prov_b"), 1) == []
    machine.on_frame(frame(0, 10), 2)
    assert machine.on_committed(1, "prov_b") == [Lookup()]
    assert machine.on_log(LogView(match(1, "prov_b")), 3) == [
        CancelAtProvider("prov_a", 1),
        Dispatch(match(1, "prov_b")),
    ]
    assert machine.on_frame(frame(10, 20), 4) == []
    assert sent(machine.on_frame(last(0, 1, "prov_b"), 5)) == RESPONSE


def test_a_queued_request_is_asked_again_in_case_the_matcher_forgot_it() -> None:
    machine = relay()
    machine.begin()
    machine.on_waiting(0)
    assert machine.on_time(TIMING.waiting_repeat_ms - 1) == []
    assert machine.on_time(TIMING.waiting_repeat_ms) == [Ask()]
    assert machine.on_time(TIMING.waiting_repeat_ms + 1) == []
    machine.on_waiting(5_100)
    assert machine.on_time(5_000 + TIMING.match_timeout_ms) == []


PIECE, PIECES = 20, 5
EPOCHS = st.integers(1, 2)
FRAMES = st.tuples(
    st.just("frame"),
    st.sampled_from(["live", "live", "live", "other"]),
    st.sampled_from([True, True, True, False]),  # from the provider of that epoch
    st.sampled_from([0, 0, 0, -1, -2, 1]),  # pieces before or after the next one
    st.integers(1, PIECES),
    st.sampled_from([False, False, True]),
)
EVENTS = st.one_of(
    FRAMES, FRAMES, FRAMES, FRAMES, FRAMES,
    st.tuples(st.just("matched"), EPOCHS),
    st.tuples(st.just("committed"), EPOCHS),
    st.tuples(st.just("committed"), st.just(0)),  # another's match of epoch 1
    st.tuples(st.just("filled"), st.integers(1, 120)),
    st.tuples(st.just("fill_ended")),
    st.tuples(st.just("log"), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("ended")),
    st.tuples(st.just("existing"), st.booleans()),
    st.tuples(st.just("waiting")),
    st.tuples(st.just("dispatch"), EPOCHS, st.sampled_from(["accepted", "busy", "silent"])),
    st.tuples(st.just("time"), st.integers(0, 3_000)),
    st.tuples(st.just("disconnect")),
)  # fmt: skip
BEGINNINGS = st.sampled_from(
    [[], [("matched", 1)], [("matched", 1), ("committed", 1)], [("matched", 1), ("matched", 2)]]
)


class Checker:
    """Performs a random history and remembers what the client would have seen."""

    def __init__(self, machine: Relay) -> None:
        self.machine = machine
        self.now = 0
        self.epochs = {
            epoch: b"".join(bytes([epoch, piece]) * (PIECE // 2) for piece in range(PIECES))
            for epoch in (1, 2)
        }
        self.live = 1
        self.contiguous = 0
        self.committed: set[int] = set()
        self.body = b""
        self.started_epoch = 0
        self.ends = 0
        self.fetch: Fetch | None = None

    def response(self, epoch: int) -> bytes:
        return self.epochs[epoch]

    def run(self, event: tuple[Any, ...]) -> None:
        machine, name = self.machine, event[0]
        if name == "matched":
            if event[1] > self.live:
                self.live, self.contiguous = event[1], 0
            actions = machine.on_matched(match(event[1]), self.now)
        elif name == "committed":
            self.committed.add(event[1])
            who = "prov_a" if event[1] else "prov_stranger"
            actions = machine.on_committed(event[1] or 1, who)
        elif name == "frame":
            actions = machine.on_frame(self.frame(*event[1:]), self.now)
        elif name == "filled":
            actions = self.fill(event[1])
        elif name == "fill_ended":
            actions = machine.on_fill_ended()
        elif name == "log":
            actions = machine.on_log(self.view(event[1], event[2]), self.now)
        elif name == "ended":
            actions = machine.on_ended(None)
        elif name == "existing":
            actions = machine.on_existing(event[1])
        elif name == "waiting":
            actions = machine.on_waiting(0)
        elif name == "dispatch":
            actions = machine.on_dispatch(event[1], event[2], "none")
        elif name == "time":
            self.now += event[1]
            actions = machine.on_time(self.now)
        else:
            actions = machine.on_disconnect()
        self.see(actions)

    def frame(self, whose: str, own: bool, shift: int, size: int, is_last: bool) -> Frame:
        epoch = self.live if whose == "live" else 3 - self.live
        whole = self.response(epoch)
        start = min(max(self.contiguous + shift * PIECE, 0), len(whole))
        end = len(whole) if is_last else min(start + size * PIECE, len(whole))
        data = whole[start:end]
        if not own:
            return Frame("prov_stranger", epoch, start, b"\xff" * len(data), is_last, end, b"\xff")
        if whose == "live" and start <= self.contiguous:
            self.contiguous = max(self.contiguous, end)
        blob_hash = bytes([epoch]) * 32 if is_last else b""
        return Frame("prov_a", epoch, start, data, is_last, end if is_last else 0, blob_hash)

    def view(self, epoch: int, settled: bool) -> LogView:
        if not epoch:
            return LogView(None, absent=settled)
        self.committed.add(epoch)
        found = match(epoch)
        if settled:
            return LogView(found, None, bytes([epoch]) * 32, len(self.response(epoch)))
        return LogView(found)

    def fill(self, size: int) -> list[Action]:
        if self.fetch is None:
            return self.machine.on_filled(b"\xee" * size)  # nobody asked
        whole = self.response(self.fetch.match.epoch)
        at = len(self.body) if self.started_epoch else self.fetch.offset
        return self.machine.on_filled(whole[at : at + size])

    def see(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.ends == 0, "nothing follows the end"
            if isinstance(action, Start):
                assert self.started_epoch == 0, "one start"
                self.started_epoch = action.match.epoch
                assert self.started_epoch in self.committed, "no byte before its commit"
            elif isinstance(action, Send):
                assert self.started_epoch, "headers first"
                self.body += action.data
            elif isinstance(action, Fetch):
                self.fetch = action
                assert action.blob_hash == bytes([action.match.epoch]) * 32
            elif isinstance(action, Finish):
                assert self.body == self.response(self.started_epoch), "the whole response"
                self.ends += 1
            elif isinstance(action, Fail):
                assert action.truncated == bool(self.started_epoch)
                self.ends += 1
            elif isinstance(action, Abandon):
                self.ends += 1
        if self.started_epoch:
            whole = self.response(self.started_epoch)
            assert whole.startswith(self.body), "in order, once, of one epoch only"
        assert self.machine.done == (self.ends == 1)


@settings(max_examples=800, deadline=None)
@given(
    beginning=BEGINNINGS, events=st.lists(EVENTS, max_size=25), stream=st.booleans(),
    attached=st.sampled_from([False, False, True]),
    buffer_limit=st.sampled_from([30, 60, 1 << 20]),
)  # fmt: skip
def test_no_history_breaks_the_promises(
    beginning: list[tuple[Any, ...]], events: list[tuple[Any, ...]], stream: bool, attached: bool,
    buffer_limit: int,
) -> None:  # fmt: skip
    machine = relay(stream=stream, attached=attached, buffer_limit=buffer_limit)
    checker = Checker(machine)
    checker.see(machine.begin())
    for event in [*beginning, *events]:
        checker.run(event)
    checker.run(("disconnect",))
    assert machine.done
    assert checker.ends == 1


@settings(max_examples=150, deadline=None)
@given(order=st.permutations(range(8)), repeated=st.integers(0, 7), commit_at=st.integers(0, 8))
def test_any_order_and_repeat_of_frames_ends_in_the_whole_response(
    order: list[int], repeated: int, commit_at: int
) -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    seen = b""
    fetch: Fetch | None = None
    for turn, index in enumerate([*order, repeated]):
        if turn == commit_at:
            actions = machine.on_committed(1)
            seen += sent(actions)
            fetch = next((a for a in actions if isinstance(a, Fetch)), fetch)
        start = index * 96
        message = last(start) if index == 7 else frame(start, start + 96)
        actions = machine.on_frame(message, turn)
        seen += sent(actions)
        fetch = next((a for a in actions if isinstance(a, Fetch)), fetch)
    if fetch is not None and not machine.done:
        seen += sent(machine.on_filled(RESPONSE[fetch.offset :]))
    assert machine.done
    assert seen == RESPONSE
