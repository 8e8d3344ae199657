"""A feed's readers get every event once and in order, or are told to read the log."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import AccountOpened
from cocoon.eventlog import feed as feeds
from cocoon.eventlog.feed import Feed
from cocoon.kernel.errors import NotFound
from tests.support.example_events import stored


def events(first: int, last: int) -> list[StoredEvent]:
    (one,) = stored(1, "account/a", [AccountOpened(account_id="a")])
    return [replace(one, position=position) for position in range(first, last + 1)]


async def positions(reader: feeds.FeedReader, limit: int = 100) -> list[int]:
    return [event.position for event in await reader.take(limit, 0.01)]


async def test_a_reader_begins_where_it_asks_and_goes_on() -> None:
    feed = Feed()
    feed.push(events(1, 5))
    reader = feed.reader()
    await reader.open(4)
    feed.push(events(6, 7))
    assert await positions(reader, 3) == [4, 5, 6]
    assert await positions(reader) == [7]
    assert await positions(reader) == []
    await reader.close()
    feed.push(events(8, 8))
    assert await positions(reader) == []


async def test_a_reader_that_comes_too_late_reads_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed()
    feed.push(events(1, feeds.KEPT))
    feed.push(events(feeds.KEPT + 1, feeds.KEPT + 2))
    with pytest.raises(NotFound):
        await feed.reader().open(2)
    await feed.reader().open(3)


async def test_a_relay_that_begins_again_does_not_make_two_of_one() -> None:
    feed = Feed()
    feed.push(events(1, 5))
    feed.push(events(3, 6))
    reader = feed.reader()
    await reader.open(3)
    assert await positions(reader) == [3, 4, 5, 6]


async def test_a_reader_that_does_not_read_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_BUFFER", 3)
    feed = Feed()
    reader = feed.reader()
    await reader.open(1)
    feed.push(events(1, 3))
    assert not reader.overflowed
    feed.push(events(4, 4))
    assert reader.overflowed
