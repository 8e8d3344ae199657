"""The client's HTTP over real sockets, against servers that answer well, badly and not at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import pytest

from cocoon.client import lines as bounds
from cocoon.client.lines import Broken, Line, Lines, Silent, Unreached

Script = Callable[["Peer"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"


@dataclass
class Peer:
    """One connection as the server sees it."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)

    async def request(self) -> bytes:
        """Read one request; returns its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        body = await self.reader.readexactly(int(size or 0))
        self.requests.append((head, body))
        return body

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0.001)


@asynccontextmanager
async def server(script: Script) -> AsyncIterator[tuple[Lines, list[Peer]]]:
    """Lines to a server that plays the script on each of its connections, then closes it."""
    peers: list[Peer] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(len(peers), reader, writer)
        peers.append(peer)
        try:
            await script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024 * 1024)
    lines = Lines(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1")
    async with listening:
        yield lines, peers
        await lines.aclose()


def answers(*pieces: bytes) -> Script:
    """A server that answers each request with these bytes, on a connection that it keeps."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*pieces)

    return script


def answers_once(*pieces: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)

    return script


async def get(lines: Lines, body: bytes | None = None, timeout_s: float = 5.0) -> Line:
    method = "GET" if body is None else "POST"
    return await lines.open(method, "/v1/jobs", {"x-a": "b"}, body, read_timeout_s=timeout_s)


async def whole(line: Line) -> bytes:
    body = bytearray()
    while piece := await line.next():
        body += piece
    line.close()
    return bytes(body)


@pytest.mark.parametrize(
    "answer",
    [
        (OK + b"Content-Length: 5\r\n\r\nhello",),
        tuple(bytes((byte,)) for byte in OK + b"content-length: 5\r\n\r\nhello"),
        (OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n", b"3;x=y\r\nllo\r\n0\r\n\r\n"),
        (OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-late: 1\r\n\r\n",),
        (b"HTTP/1.1 103 Early Hints\r\nx-early: 1\r\n\r\n", OK + b"content-length: 5\r\n\r\nhello"),
    ],
    ids=("whole", "byte by byte", "chunked", "trailers", "hints first"),
)
async def test_an_answer_is_read_and_its_connection_used_again(answer: tuple[bytes, ...]) -> None:
    async with server(answers(*answer)) as (lines, peers):
        for _ in range(3):
            line = await get(lines, b"sealed")
            assert line.status == 200
            assert not {"x-early", "x-late"} & set(line.headers)
            assert await whole(line) == b"hello"
    (peer,) = peers
    assert [body for _, body in peer.requests] == [b"sealed"] * 3
    assert peer.requests[0][0].startswith(b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1:")


async def test_a_body_may_end_with_its_connection() -> None:
    async with server(answers_once(b"HTTP/1.0 200 OK\r\n\r\nhel", b"lo")) as (lines, peers):
        for _ in range(2):
            assert await whole(await get(lines)) == b"hello"
        assert len(peers) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        OK + b"x-long: " + b"a" * (2 * 1024 * 1024) + b"\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100_000,
    ],
    ids=("nothing", "no HTTP", "no header", "upgrade", "long head", "two lengths", "hints only"),
)
async def test_what_is_no_answer_breaks_the_line(answer: bytes) -> None:
    async with server(answers_once(answer)) as (lines, _):
        with pytest.raises(Broken):
            await get(lines, b"sealed")


@pytest.mark.parametrize(
    "rest",
    [
        b"content-length: 50\r\n\r\nhello",
        b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\nnot hex\r\n",
        b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx: " + b"a" * (2 * 1024 * 1024),
        b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n1;" + b"a" * (2 * 1024 * 1024),
    ],
    ids=("short", "no end", "bad chunk", "long trailer", "long chunk extension"),
)
async def test_a_body_that_is_not_whole_gives_what_came_and_breaks(rest: bytes) -> None:
    async with server(answers_once(OK + rest[:60], rest[60:])) as (lines, peers):
        line = await get(lines)
        assert await line.next() == b"hello"
        with pytest.raises(Broken):
            await line.next()
        line.close()
        with pytest.raises(Broken):
            await whole(await get(lines))
        assert len(peers) == 2


async def test_silence_before_and_inside_an_answer_is_told_apart_from_an_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number:
            await peer.send(OK + b"content-length: 50\r\n\r\nhello")
        await peer.reader.read()

    async with server(script) as (lines, _):
        with pytest.raises(Silent):
            await get(lines, b"sealed", timeout_s=0.05)
        line = await get(lines, b"sealed", timeout_s=0.05)
        assert await line.next() == b"hello"
        with pytest.raises(Silent):
            await line.next()
        line.close()


async def test_bytes_that_nobody_asked_for_end_a_kept_connection() -> None:
    twice = OK + b"content-length: 2\r\n\r\nok" + OK + b"content-length: 4\r\n\r\nevil"
    async with server(answers(twice)) as (lines, peers):
        for _ in range(3):
            assert await whole(await get(lines, b"sealed")) == b"ok"
        assert len(peers) == 3


async def test_a_kept_connection_that_ended_is_replaced_only_where_nothing_is_sent_twice() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"content-length: 2\r\n\r\nok")
        if peer.number % 2 == 0:
            await peer.request()  # takes the next one, and ends

    async with server(script) as (lines, peers):
        assert await whole(await get(lines)) == b"ok"
        assert await whole(await get(lines)) == b"ok"  # asked again on another connection
        assert len(peers) == 2
    async with server(script) as (lines, peers):
        assert await whole(await get(lines, b"sealed")) == b"ok"
        with pytest.raises(Broken):
            await get(lines, b"sealed")
        assert len(peers) == 1


async def test_one_who_leaves_early_ends_the_connection() -> None:
    left = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        with suppress(ConnectionError):
            while True:
                await peer.send(b"1\r\n.\r\n")
        left.set()

    async with server(script) as (lines, _):
        line = await get(lines)
        line.close()
        assert await line.next() == b""
        await asyncio.wait_for(left.wait(), 5)


async def test_an_unread_body_is_not_taken_beyond_a_bound() -> None:
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(OK + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(500):
            await peer.send(b"10000\r\n" + bytes(65536) + b"\r\n")
            sent += 65536
        await peer.send(b"0\r\n\r\n")

    async with server(script) as (lines, _):
        line = await get(lines)
        before = -1
        while before != sent:  # until the server stands still
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 24 * 1024 * 1024
        assert len(await whole(line)) == 500 * 65536


async def test_a_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * 16 * 1024  # 4 MiB
    async with server(answers(OK + b"content-length: 2\r\n\r\nok")) as (lines, peers):
        for _ in range(2):
            assert await whole(await get(lines, body)) == b"ok"
        assert [got == body for _, got in peers[0].requests] == [True, True]


async def test_an_early_answer_ends_the_sending_and_the_connection() -> None:
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await read.wait()

    async with server(script) as (lines, peers):
        for _ in range(2):
            line = await get(lines, bytes(16 * 1024 * 1024))
            assert line.status == 413
            assert await whole(line) == b"no"
        assert len(peers) == 2
        read.set()


async def test_where_nobody_listens_nothing_is_reached() -> None:
    with pytest.raises(Unreached):
        await get(Lines("http://127.0.0.1:9"))


async def test_no_more_connections_are_opened_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(bounds, "POOL_TIMEOUT_S", 0.05)
    async with server(answers(OK + b"content-length: 2\r\n\r\nok")) as (lines, peers):
        first, second = await get(lines), await get(lines)
        with pytest.raises(Unreached):
            await get(lines)
        assert await whole(first) == await whole(second) == b"ok"
        waiting = [await get(lines), await get(lines)]
        monkeypatch.setattr(bounds, "POOL_TIMEOUT_S", 5)
        third = asyncio.create_task(get(lines))
        await asyncio.sleep(0)
        assert [await whole(line) for line in waiting] == [b"ok"] * 2
        assert await whole(await third) == b"ok"
        assert len(peers) == 2


async def test_a_header_that_is_more_than_a_line_is_not_sent() -> None:
    async with server(answers(OK + b"content-length: 0\r\n\r\n")) as (lines, peers):
        for value in ("a\r\nb: c", "a\nb", "a\rb"):
            with pytest.raises(ValueError, match="one line"):
                await lines.open("GET", "/", {"x": value}, None, read_timeout_s=1)
        assert not peers


@pytest.mark.parametrize(
    ("url", "base", "start"),
    [
        ("http://[::1]:9", "http://[::1]:9", b"GET /v1/x HTTP/1.1\r\nhost: [::1]:9\r\n"),
        (
            "http://gateway.example/a b/v1/",
            "http://gateway.example/a b",
            b"GET /a%20b/v1/x HTTP/1.1\r\nhost: gateway.example\r\n",
        ),
        (
            "https://b\u00fccher.example",
            "https://b\u00fccher.example",
            b"GET /v1/x HTTP/1.1\r\nhost: xn--bcher-kva.example\r\n",
        ),
    ],
)
async def test_addresses_are_written_as_http_wants_them(url: str, base: str, start: bytes) -> None:
    lines = Lines(url)
    assert lines.base_url == base
    assert lines._head("GET", "/v1/x", {}, None).startswith(start)


async def test_a_head_that_drips_is_not_waited_for_without_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"x-a: ")
        while True:
            await peer.send(b"a")

    async with server(script) as (lines, _):
        with pytest.raises(Silent):
            await get(lines, b"sealed", timeout_s=0.2)


@pytest.mark.parametrize("black_holes", [1, 2])
async def test_an_address_that_leads_nowhere_does_not_hide_the_next(
    monkeypatch: pytest.MonkeyPatch, black_holes: int
) -> None:
    async with server(answers(OK + b"content-length: 5\r\n\r\nhello")) as (local, peers):
        with full_listener(local._port):
            nowhere = [(socket.AF_INET, 1, 6, "", ("127.0.0.2", local._port))] * black_holes
            there = (socket.AF_INET, 1, 6, "", ("127.0.0.1", local._port))
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*nowhere, there])
            lines = Lines(f"http://gateway.example:{local._port}")
            assert await whole(await get(lines, b"sealed")) == b"hello"
            assert len(peers) == 1
            await lines.aclose()


@contextmanager
def full_listener(port: int) -> Iterator[None]:
    """127.0.0.2 takes no connection on that port and refuses none, like a route into nothing."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.2", port))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", port))
        yield
