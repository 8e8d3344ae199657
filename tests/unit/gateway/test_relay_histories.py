"""Any history of one job at the gateway: its promises hold after every step."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.actions import (
    Abandon,
    Action,
    Fail,
    Fetch,
    Finish,
    Frame,
    LogView,
    Send,
    Start,
)  # fmt: skip
from services.gateway.decide import Relay
from tests.support.relay_world import (
    RESPONSE,
    frame,
    last,
    match,
    relay,
    sent,
)

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
    st.tuples(st.just("refused")),
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
        elif name == "refused":
            actions = machine.on_refused(None)
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
