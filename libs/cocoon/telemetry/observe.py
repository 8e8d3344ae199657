"""A tiny HTTP server on loopback for /metrics and /healthz, and what a service adds; no bodies in.

Health is a table of named conditions: all true is 200, else 503, with the table as JSON. A page
is read by anybody on this machine; an action needs the bearer token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cocoon.kernel.errors import ConfigurationError
from cocoon.telemetry import metrics

Health = Callable[[], Mapping[str, bool]]
Closer = Callable[[], Awaitable[None]]
Page = Callable[[], Mapping[str, Any]]
Action = Callable[[], Awaitable[tuple[int, Mapping[str, Any]]]]  # status and JSON

MAX_CONNECTIONS: Final = 16
MAX_HEAD_BYTES: Final = 8 * 1024
TIMEOUT_S: Final = 5.0
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_REASONS: Final = {
    200: "OK", 202: "Accepted", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    409: "Conflict", 422: "Unprocessable Content", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Extra:
    """What a service serves besides: `pages` by GET, `actions` by POST with the token."""

    pages: Mapping[str, Page] = field(default_factory=dict)
    actions: Mapping[str, Action] = field(default_factory=dict)
    token: str = field(default="", repr=False)


_NOTHING: Final = Extra()


async def serve_observe(
    host: str, port: int, health: Health, *, anywhere: bool = False, extra: Extra = _NOTHING
) -> tuple[int, Closer]:
    """Serve until the returned closer is awaited; port 0 takes any. Returns the bound port.

    Raises ConfigurationError for a host that is not loopback, unless `anywhere` (a container,
    where the network policy is the wall), and OSError if the port is taken.
    """
    if host not in _LOOPBACK and not anywhere:
        raise ConfigurationError("metrics and health are served on loopback only")
    tasks: set[asyncio.Task[None]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - the server runs this in a task
        if len(tasks) >= MAX_CONNECTIONS:
            writer.close()
            return
        tasks.add(task)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await _answer(reader, writer, health, extra)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(on_connection, host, port, limit=MAX_HEAD_BYTES)

    async def close() -> None:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

    return int(server.sockets[0].getsockname()[1]), close


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, health: Health, extra: Extra
) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    named = path.decode("ascii", "replace")
    if method == b"POST" and named in extra.actions:
        status, kind, body = await _act(head, extra.actions[named], extra.token)
    elif method in (b"GET", b"HEAD") and named in extra.pages:
        status, kind, body = 200, _JSON, json.dumps(extra.pages[named]()).encode()
    else:
        status, kind, body = _respond(method, path, health)
    writer.write(
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    )
    if method != b"HEAD":
        writer.write(body)
    await writer.drain()


async def _act(head: bytes, action: Action, token: str) -> tuple[int, str, bytes]:
    if not token or not hmac.compare_digest(_bearer(head), token.encode()):
        return 401, _TEXT, b"send the token of the service's folder as a bearer token\n"
    status, told = await action()
    return status, _JSON, json.dumps(told).encode()


def _bearer(head: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"authorization":
            kind, _, given = value.strip().partition(b" ")
            return given.strip() if kind.lower() == b"bearer" else b""
    return b""


def _respond(method: bytes, path: bytes, health: Health) -> tuple[int, str, bytes]:
    if method not in (b"GET", b"HEAD"):
        return 405, _TEXT, b"only GET is answered here\n"
    if path == b"/metrics":
        return 200, "text/plain; version=0.0.4; charset=utf-8", metrics.render()
    if path == b"/healthz":
        conditions = dict(health())
        status = 200 if all(conditions.values()) else 503
        return status, _JSON, json.dumps(conditions).encode()
    return 404, _TEXT, b"try /metrics or /healthz\n"
