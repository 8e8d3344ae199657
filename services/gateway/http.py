"""HTTP around the routes: bounded bodies, JSON answers, the streamed response. Raw ASGI, no state.

Errors are OpenAI's error object with the status of the tree's class, Retry-After where it helps.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final, TypeAlias

from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    DeadlineExceeded,
    MethodNotAllowed,
    TooLarge,
)  # fmt: skip
from cocoon.sealing.envelope import MAGIC, MAX_ENVELOPE_BYTES
from services.gateway.budget import Share

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header: TypeAlias = tuple[bytes, bytes]

MAX_WRITE_BYTES: Final = 256 * 1024
SEALED_TYPE: Final = b"application/vnd.cocoon.cai1"
NO_STORE: Final = b"no-store"
FOR_EVER: Final = b"public, max-age=31536000, immutable"  # of what its own address hashes
ABORT: Final = "cocoon.abort"  # the scope's extension that drops the connection at once
CUT: Final = "cocoon.cut"  # and the one that closes it behind what was written


class ClientGone(Exception):
    """The client closed its connection before it sent the whole request."""


class Request:
    """One request: its headers by name (lower case) and its body, read within bounds."""

    __slots__ = ("_receive", "headers", "method", "path", "peer", "query", "read_all", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self._receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.peer: str = (scope.get("client") or ("",))[0]  # the address at the connection's end
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.read_all = self.method in ("GET", "HEAD")

    async def sealed_body(self, share: Share, timeout_s: float) -> tuple[bytes, str]:
        """The envelope and its SHA-256, hashed as it comes.

        Raises TooLarge while reading, BadRequest for anything but CAI/1, DeadlineExceeded for a
        body that takes longer than `timeout_s`, ClientGone, and RateLimited when it does not fit
        into memory: before the first byte is read if its size was declared.
        """
        declared = self.headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MAX_ENVELOPE_BYTES:
            raise _too_large()
        share.check(int(declared))
        digest, parts, size = hashlib.sha256(), [], 0
        try:
            async with asyncio.timeout(timeout_s):
                while not self.read_all:
                    chunk = await self._next()
                    if not chunk:
                        continue
                    if not size and chunk[:4] != MAGIC[: len(chunk)]:
                        raise BadRequest("the body is not a CAI/1 request", code="bad_magic")
                    size += len(chunk)
                    if size > MAX_ENVELOPE_BYTES:
                        raise _too_large()
                    share.need(len(chunk))
                    digest.update(chunk)
                    parts.append(chunk)
        except TimeoutError:
            raise DeadlineExceeded("the request's body did not come in time") from None
        return (parts[0] if len(parts) == 1 else b"".join(parts)), digest.hexdigest()

    async def small_body(self, most_bytes: int, timeout_s: float) -> bytes:
        """A short body that is no envelope. Raises TooLarge, DeadlineExceeded, ClientGone."""
        body = b""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.read_all:
                    body += await self._next()
                    if len(body) > most_bytes:
                        raise TooLarge(f"the body of this request is at most {most_bytes} bytes")
        except TimeoutError:
            raise DeadlineExceeded("the request's body did not come in time") from None
        return body

    async def gone(self) -> None:
        """Return when the client has closed its connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.read_all = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body


def _parts(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """The body in writes of at most 256 KiB, each with whether it is the last.

    The server copies what the socket does not take, and a write waits only for the one before it.
    """
    if len(body) <= MAX_WRITE_BYTES:
        yield body, True
        return
    for at in range(0, len(body), MAX_WRITE_BYTES):
        yield body[at : at + MAX_WRITE_BYTES], at + MAX_WRITE_BYTES >= len(body)


def _too_large() -> TooLarge:
    return TooLarge(f"a sealed request is at most {MAX_ENVELOPE_BYTES} bytes; send less")


class StreamedResponse:
    """The answer to a job. Ended without its last part, the body is cut short: truncated."""

    __slots__ = ("_request", "_send", "finished", "started")

    def __init__(self, request: Request, send: Send) -> None:
        self._request, self._send = request, send
        self.started = self.finished = False

    async def start(self, headers: list[Header], length: int | None, status: int = 200) -> None:
        self.started = True
        told = [(b"content-type", SEALED_TYPE), (b"cache-control", NO_STORE), *headers]
        if length is not None:
            told.append((b"content-length", b"%d" % length))
        await self._send({"type": "http.response.start", "status": status, "headers": told})

    async def send_within(self, data: bytes, timeout_s: float, *, last: bool = False) -> bool:
        """Send a part of the body; `last` ends it. A reader that takes longer than `timeout_s`
        for 256 KiB loses its connection. Returns whether it read.
        """
        try:
            for part, end in _parts(data):
                more_body = not (last and end)
                async with asyncio.timeout(timeout_s):
                    await self._send(
                        {"type": "http.response.body", "body": part, "more_body": more_body}
                    )
        except TimeoutError:
            self.abort()
            return False
        self.finished = last
        return True

    async def finish(self) -> None:
        self.finished = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def abort(self) -> None:
        """Drop the connection and what is still to be written to it."""
        self._request.scope[ABORT]()

    def end(self) -> None:
        """Close the connection behind a body that was not finished."""
        if self.started and not self.finished:
            self._request.scope[CUT]()

    def watch(self, on_gone: Callable[[], None]) -> asyncio.Task[None]:
        async def wait() -> None:
            await self._request.gone()
            on_gone()

        return asyncio.create_task(wait())


async def send_json(
    send: Send, value: bytes | str | dict[str, Any], status: int = 200,
    headers: tuple[Header, ...] = (), *, cached: bytes = NO_STORE,
) -> None:  # fmt: skip
    """Answer with a JSON value, or with one that was written already, in bounded parts."""
    if isinstance(value, dict):
        value = json.dumps(value)
    body = value.encode() if isinstance(value, str) else value
    told = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", cached),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": told})
    for part, last in _parts(body):
        await send({"type": "http.response.body", "body": part, "more_body": not last})


async def send_error(send: Send, request: Request, error: CocoonError) -> None:
    """Answer with an error, at once; server.py drops what the client still sends of its body."""
    headers: list[Header] = []
    if error.retry_after_s is not None or error.http_status in (429, 503):
        headers.append((b"retry-after", b"%d" % (error.retry_after_s or 1)))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="cocoon"'))
    if not request.read_all and b"expect" in request.headers:  # its body may never come
        headers.append((b"connection", b"close"))
    await send_json(send, error.to_openai(), error.http_status, tuple(headers))
