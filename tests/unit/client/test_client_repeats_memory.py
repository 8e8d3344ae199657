"""The memory of recent requests and the recording of an answer, on a real loop without sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.client import recording as recordings
from cocoon.client import repeats as memory
from cocoon.client.recording import Head, Reading, Recording
from cocoon.client.repeats import Asked, Entry, Repeats
from cocoon.kernel.errors import Conflict, Unavailable

HEAD = Head(200, ())


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now_ms(self) -> int:
        return int(self.now_s * 1000)

    def monotonic_s(self) -> float:
        return self.now_s


class Works:
    """The work of every entry: runs until it is told how to end."""

    def __init__(self) -> None:
        self.started = 0
        self.go = asyncio.Event()
        self.fail = False

    async def __call__(self, entry: Entry) -> None:
        self.started += 1
        number = self.started
        try:
            await self.go.wait()
            entry.recording.begin(HEAD, failed=self.fail)
            await entry.recording.write(b"answer %d" % number)
        finally:
            entry.recording.end()


def asked(body: bytes = b"body", **more: Any) -> Asked:
    return Asked(**{"body": body, "caller": "me", "key": None, "retry": None, **more})


async def read(reading: Reading) -> bytes:
    whole = b"".join([part async for part in reading])
    for _ in range(3):
        await asyncio.sleep(0)  # the entry's task ends
    return whole


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(min_value=0, max_value=30))
@settings(max_examples=30, deadline=None)
def test_every_reader_gets_every_byte_whenever_it_comes(parts: list[bytes], late: int) -> None:
    async def run() -> None:
        recording = Recording()
        early = recording.attach()
        reading = asyncio.create_task(read(early))
        later: list[asyncio.Task[bytes]] = []
        recording.begin(HEAD)
        for index, part in enumerate(parts):
            if index == late:
                later.append(asyncio.create_task(read(recording.attach())))
            await recording.write(part)
        recording.end()
        later.append(asyncio.create_task(read(recording.attach())))
        whole = b"".join(parts)
        assert await reading == whole
        assert [await task for task in later] == [whole] * len(later)
        assert early.complete

    asyncio.run(run())


async def test_a_large_answer_waits_for_its_reader_and_forgets_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recordings, "KEEP_BYTES", 1000)
    monkeypatch.setattr(recordings, "WINDOW_BYTES", 500)
    recording = Recording()
    reading = recording.attach()
    recording.begin(HEAD)
    greatest = 0

    async def write() -> None:
        nonlocal greatest
        for _ in range(100):
            await recording.write(b"x" * 100)
            greatest = max(greatest, recording.kept_bytes)
        recording.end()

    writing = asyncio.create_task(write())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not writing.done()
    assert await read(reading) == b"x" * 10_000
    await writing
    assert greatest <= 1700
    assert not recording.whole


async def test_a_reader_that_leaves_lets_a_large_answer_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recordings, "KEEP_BYTES", 100)
    monkeypatch.setattr(recordings, "WINDOW_BYTES", 100)
    recording = Recording()
    reading = recording.attach()
    writing = asyncio.create_task(recording.write(b"x" * 1000))
    await asyncio.sleep(0)
    assert not writing.done()
    reading.close()
    await writing


async def test_a_recording_that_ends_without_a_head_says_so() -> None:
    recording = Recording()
    recording.end()
    with pytest.raises(Unavailable):
        await recording.attach().head()


async def test_a_key_names_one_entry_until_it_is_forgotten() -> None:
    clock, works = Hand(), Works()
    repeats = Repeats(works, clock=clock)
    entry, first = repeats.open(asked(key="k"))
    again, second = repeats.open(asked(key="k"))
    assert entry is again
    with pytest.raises(Conflict) as caught:
        repeats.open(asked(b"other", key="k"))
    assert caught.value.code == "idempotency_mismatch"
    works.go.set()
    assert await read(first) == await read(second) == b"answer 1"
    clock.now_s = memory.KEYED_MEMORY_S
    assert repeats.open(asked(key="k"))[0] is entry
    clock.now_s += 0.1
    assert repeats.open(asked(key="k"))[0] is not entry
    await repeats.aclose()


async def test_a_retry_prefers_the_request_that_nobody_listens_to() -> None:
    works = Works()
    repeats = Repeats(works, clock=Hand())
    heard, _ = repeats.open(asked(retry=0))
    lost, reading = repeats.open(asked(retry=0))
    repeats.leave(lost, reading)
    assert repeats.open(asked(retry=1))[0] is lost
    assert repeats.open(asked(retry=1))[0] is heard  # it is the only other earlier attempt
    assert repeats.open(asked(retry=1))[0] not in (lost, heard)
    assert repeats.open(asked(b"other", retry=1))[0].asked.body == b"other"
    assert repeats.open(asked(caller="you", retry=1))[0].asked.caller == "you"
    await repeats.aclose()


async def test_a_retry_comes_too_late_after_a_minute() -> None:
    clock, works = Hand(), Works()
    works.go.set()
    repeats = Repeats(works, clock=clock)
    entry, reading = repeats.open(asked(retry=0))
    await read(reading)
    clock.now_s = memory.RETRY_MEMORY_S + 1
    assert repeats.open(asked(retry=1))[0] is not entry
    await repeats.aclose()


async def test_a_failure_is_tried_again_and_an_answer_is_not() -> None:
    works = Works()
    works.go.set()
    works.fail = True
    repeats = Repeats(works, clock=Hand())
    _, first = repeats.open(asked(key="k"))
    assert await read(first) == b"answer 1"
    works.fail = False
    _, second = repeats.open(asked(key="k"))
    assert await read(second) == b"answer 2"
    _, third = repeats.open(asked(key="k"))
    assert await read(third) == b"answer 2"
    await repeats.aclose()


async def test_leaving_cancels_only_what_nobody_waits_for() -> None:
    works = Works()
    repeats = Repeats(works, clock=Hand())
    entry, first = repeats.open(asked(key="k"))
    _, second = repeats.open(asked(key="k"))
    repeats.leave(entry, first)
    assert entry.grace is None
    repeats.leave(entry, second)
    assert entry.grace is not None
    _, third = repeats.open(asked(key="k"))  # back within the grace
    assert entry.grace is None
    works.go.set()
    assert await read(third) == b"answer 1"
    plain, reading = repeats.open(asked(b"plain"))
    works.go.clear()
    repeats.leave(plain, reading)
    assert plain.cancelled
    await repeats.aclose()


async def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_ENTRIES", 10)
    monkeypatch.setattr(memory, "MAX_LIVE", 3)
    works = Works()
    works.go.set()
    repeats = Repeats(works, clock=Hand())
    for index in range(30):
        _, reading = repeats.open(asked(b"%d" % index, key=str(index)))
        await read(reading)
        assert len(repeats._entries) <= 10
        assert len(repeats._by_key) == len(repeats._by_fingerprint) == len(repeats._entries)
    works.go.clear()
    for index in range(3):
        repeats.open(asked(b"live %d" % index))
    with pytest.raises(Unavailable):
        repeats.open(asked(b"one more"))
    await repeats.aclose()
    assert not repeats._entries


async def test_too_many_bytes_drop_what_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_BYTES", 100)
    clock, works = Hand(), Works()
    works.go.set()
    repeats = Repeats(works, clock=clock)
    first, reading = repeats.open(asked(b"x" * 40, key="first"))  # 80 bytes and its answer
    await read(reading)
    clock.now_s = 1
    second, reading = repeats.open(asked(b"y" * 40, retry=0))
    await read(reading)
    assert repeats.open(asked(b"x" * 40, key="first"))[0] is not first
    assert repeats.open(asked(b"y" * 40, retry=1))[0] is second
    await repeats.aclose()
    assert repeats._kept_bytes == repeats._live == 0
    assert not repeats._keyed
    assert not repeats._plain


async def test_a_late_reader_gets_what_is_there_in_one_piece() -> None:
    recording = Recording()
    recording.begin(HEAD)
    for part in (b"a", b"b", b"c"):
        await recording.write(part)
    recording.end()
    assert [part async for part in recording.attach()] == [b"abc"]
