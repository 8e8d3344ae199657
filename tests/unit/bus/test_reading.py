"""However a connection's bytes are cut, each message is delivered once, in order and whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.bus import reading as rooms
from cocoon.bus.reading import Reading, over

DIRECT, OTHER = 1, 2


class Transport:
    """What a reading does to its connection."""

    def __init__(self) -> None:
        self.paused = self.aborted = False

    def set_protocol(self, _: object) -> None: ...

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted = True


class World:
    """A reading, what it delivered and what it left to nats-py."""

    def __init__(self) -> None:
        self.delivered: list[tuple[bytes, bytes, bytes, bytes]] = []
        self.transport = Transport()
        inner: Any = asyncio.Protocol()
        transport: Any = self.transport
        self.reading = Reading(inner, transport, self._deliver)

    def _deliver(self, sid: int, subject: bytes, reply: bytes, head: bytes, body: bytes) -> bool:
        if sid == DIRECT:
            self.delivered.append((subject, reply, head, body))
        return sid == DIRECT

    @property
    def left(self) -> list[bytes]:
        return list(self.reading._queued)


messages = st.tuples(
    st.sampled_from([DIRECT, OTHER]), st.sampled_from([b"", b"r.1"]),
    st.none() | st.binary(max_size=20), st.binary(max_size=40) | st.just(b"MSG a 1 2\r\nab\r\n"),
)  # fmt: skip
lines = st.sampled_from([b"PING\r\n", b"+OK\r\n", b"-ERR 'no'\r\n", b'INFO {"a":1}\r\n'])


def written(sid: int, reply: bytes, head: bytes | None, body: bytes) -> bytes:
    words = [b"MSG" if head is None else b"HMSG", b"s.x", b"%d" % sid, *([reply] if reply else [])]
    if head is not None:
        words.append(b"%d" % len(head))
    words.append(b"%d" % (len(head or b"") + len(body)))
    return b" ".join(words) + b"\r\n" + (head or b"") + body + b"\r\n"


@given(st.lists(messages | lines, max_size=8), st.lists(st.integers(1, 30), max_size=60))
def test_every_cut_gives_the_same_messages(said: list, cuts: list[int]) -> None:
    whole = [item if isinstance(item, bytes) else written(*item) for item in said]
    data, world = b"".join(whole), World()
    for size in [*cuts, len(data) + 1]:
        if data:
            world.reading.data_received(data[:size])
        data = data[size:]
    direct = [m for m in said if not isinstance(m, bytes) and m[0] == DIRECT]
    assert world.delivered == [
        (b"s.x", reply, head or b"", body) for _, reply, head, body in direct
    ]
    assert world.left == [raw for raw, item in zip(whole, said, strict=True) if item not in direct]
    assert world.reading._rest == b""


def test_the_servers_own_account_writes_two_spaces_where_there_is_no_reply() -> None:
    world = World()
    world.reading.data_received(
        b"MSG s.x 1  2\r\nab\r\nHMSG s.x 1  12 14\r\nNATS/1.0\r\n\r\nab\r\n"
    )
    head = b"NATS/1.0\r\n\r\n"
    assert world.delivered == [(b"s.x", b"", b"", b"ab"), (b"s.x", b"", head, b"ab")]


def test_what_is_no_message_is_left_to_the_parser() -> None:
    world = World()
    world.reading.data_received(b"HELLO\r\n")
    assert world.delivered == []
    assert world.left == [b"HELLO\r\n"]


@pytest.mark.parametrize(
    "line", [b"MSG s x 3", b"MSG s 1", b"MSG s 1 r -", b"MSG  s 1 3", b"HMSG s 1 3",
             b"HMSG s 1 9 3", b"MSG s 1 r r 3"]
)  # fmt: skip
def test_a_message_that_cannot_be_understood_ends_the_connection(line: bytes) -> None:
    world = World()
    forged = b"MSG mat.gw.job 1 6\r\nFORGED\r\n"
    world.reading.data_received(line + b"\r\n" + forged)
    assert world.delivered == []
    assert world.left == []
    assert world.transport.aborted


@pytest.mark.parametrize("odd", [b"\x0b", b"\x0c", b"\t", b"\xff", b"\x85", b"\x7f"])
@pytest.mark.parametrize("sid", [DIRECT, OTHER])
def test_a_hostile_subject_or_reply_takes_its_own_message_along_and_no_other(
    odd: bytes, sid: int
) -> None:
    world = World()
    payload = b"MSG mat.gw.job 1 6\r\nFORGED"
    for names in (b"tok.a%bx %d" % (odd, sid), b"hb.a %d r%bx" % (sid, odd)):
        world.reading.data_received(b"MSG %b %d\r\n%b\r\n" % (names, len(payload), payload))
    world.reading.data_received(b"MSG good 1 2\r\nok\r\n")
    assert world.delivered == [(b"good", b"", b"", b"ok")]
    assert world.left == []


def test_a_line_without_an_end_ends_the_connection() -> None:
    world = World()
    world.reading.data_received(b"x" * (rooms.MAX_LINE_BYTES + 1))
    assert world.transport.aborted


async def test_what_waits_for_the_parser_is_bounded() -> None:
    world = World()
    world.reading.data_received(b"PING\r\n" * rooms.MAX_QUEUED)
    assert world.transport.paused
    for _ in range(rooms.MAX_QUEUED):
        assert await world.reading.whole() == b"PING\r\n"
    assert not world.transport.paused


async def test_the_end_comes_after_what_was_said_before_it() -> None:
    world = World()
    waiting = asyncio.ensure_future(world.reading.whole())
    await asyncio.sleep(0)
    world.reading.data_received(b"PING\r\n+OK\r\n")
    world.reading.connection_lost(None)
    assert await waiting == b"PING\r\n"
    assert await world.reading.whole() == b"+OK\r\n"
    assert await world.reading.whole() == b""


async def test_an_end_behind_bytes_that_wait_is_heard() -> None:
    read, ended = asyncio.Event(), asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"PING\r\n")
        writer.write_eof()
        await read.wait()
        writer.transport.abort()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await asyncio.sleep(0.1)  # both have arrived, and nobody has read them
    reading = over(reader, writer, lambda *_: False)
    assert await reading.whole() == b"PING\r\n"
    async with asyncio.timeout(1):
        assert await reading.whole() == b""
    read.set()
    await ended.wait()
    writer.transport.abort()
    server.close()
    await asyncio.sleep(0.05)
