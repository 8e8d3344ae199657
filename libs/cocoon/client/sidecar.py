"""The sidecar: an OpenAI endpoint on loopback for programs that cannot load this package.

Plaintext stays on this machine. It answers loopback names only (DNS rebinding) and no web page
of another origin; there is no CORS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from urllib.parse import urlsplit

from cocoon.client.door import MAX_BODY_BYTES, LocalAnswer, LocalRequest, error_answer
from cocoon.client.network import Network, NetworkOptions
from cocoon.kernel.errors import CocoonError, Forbidden, TooLarge

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_TIMEOUT_S: Final = 60.0  # for a caller to send its whole body
MAX_DRAINED_BYTES: Final = 64 * 1024 * 1024
DRAIN_S: Final = 5.0


class _Ended(TooLarge):
    """Too large, and read to its end: there is nothing left to drain."""


class _Gone(Exception):
    """The caller left before its request was whole."""


class Sidecar:
    """The ASGI application. Opens its network at startup and closes it at shutdown."""

    def __init__(self, options: NetworkOptions) -> None:
        self._options = options
        self._network: Network | None = None
        self.failure: CocoonError | None = None  # why it could not be opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def end_answers(self) -> None:
        """Cancel what runs; whoever reads it is told that the client closes."""
        if self._network is not None:
            await self._network.door.aclose()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self._network = Network(self._options)
        except CocoonError as error:
            self.failure = error  # what runs the server tells it to a person
            await send({"type": "lifespan.startup.failed", "message": error.message})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._network.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop the moment the caller leaves."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        try:
            _check_origin(headers)
            body = await _read_body(headers, receive)
        except _Gone:
            return
        except CocoonError as error:
            if not isinstance(error, _Ended):
                await _drain(receive)
            # what is left of the body is not read, so the connection cannot be used again
            await _send(error_answer(error), send, extra=((b"connection", b"close"),))
            return
        request = LocalRequest(scope["method"], scope["path"], headers, body)
        async with _while_there(receive):
            await self._answer(request, send)

    async def _answer(self, request: LocalRequest, send: Send) -> None:
        assert self._network is not None  # noqa: S101 - lifespan ran first
        await _send(await self._network.door.answer(request), send)


async def _send(
    answer: LocalAnswer, send: Send, *, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    try:
        headers = [(name.encode(), value.encode()) for name, value in answer.headers]
        await send({
            "type": "http.response.start", "status": answer.status, "headers": [*headers, *extra],
        })  # fmt: skip
        async for part in answer.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        answer.close()


@asynccontextmanager
async def _while_there(receive: Receive) -> AsyncIterator[None]:
    """End the block, quietly, the moment the caller leaves."""
    working, left = asyncio.current_task(), False
    assert working is not None  # noqa: S101 - an application runs in a task

    def leave(_: object) -> None:
        nonlocal left
        left = working.cancel()

    gone = asyncio.create_task(_disconnected(receive))
    gone.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not left or working.uncancel():
            raise
    finally:
        gone.remove_done_callback(leave)
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Drop what a refused caller still sends, within bounds: one that is cut off while it writes
    never reads why.
    """
    left = MAX_DRAINED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


async def _read_body(headers: dict[str, str], receive: Receive) -> bytes:
    """Raises TooLarge before more than the limit is held, _Gone when the caller leaves."""
    declared = headers.get("content-length", "0")
    too_large = TooLarge(f"A request's body is at most {MAX_BODY_BYTES} bytes; send less.")
    if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise too_large if message.get("more_body") else _Ended(too_large.message)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise _Gone from None


def _check_origin(headers: dict[str, str]) -> None:
    """Raises Forbidden for names that are not loopback's and for other sites' web pages.

    Without this a web page could spend the owner's money, or read answers by rebinding its name.
    """
    if _hostname("//" + headers.get("host", "")) not in LOOPBACK_NAMES:
        raise Forbidden(
            "The sidecar answers to localhost, 127.0.0.1 and [::1] only; use one of these.",
            code="host_refused",
        )
    origin = headers.get("origin")
    if origin is not None and _hostname(origin) not in LOOPBACK_NAMES:
        raise Forbidden(
            "The sidecar does not serve web pages of other origins; call it from a program.",
            code="origin_refused",
        )
    if headers.get("sec-fetch-site") == "cross-site":
        raise Forbidden("The sidecar does not serve other sites.", code="origin_refused")


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
