"""NATS over a WebSocket: nats-py's transport with deadlines, and an end that waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any, Final

import aiohttp
from nats.aio.transport import WebSocketTransport

_CLOSE_S: Final = 1.0  # for the server to say goodbye


class BusWebSocket(WebSocketTransport):
    """One connection; nats-py opens another object for the next."""

    async def open(self, url: str, context: ssl.SSLContext | None, timeout_s: float) -> None:
        """Connect and upgrade. Raises OSError, TimeoutError or aiohttp.ClientError."""
        timeout = aiohttp.ClientWSTimeout(ws_close=_CLOSE_S)
        async with asyncio.timeout(timeout_s):
            self._ws = await self._client.ws_connect(
                url, ssl=context if context is not None else True, timeout=timeout,
                max_msg_size=0, compress=0, proxy=None,
            )  # fmt: skip
        self._using_tls = context is not None

    async def connect(self, *_: Any, **__: Any) -> None:
        raise AssertionError("BusClient opens it")

    async def connect_tls(self, *_: Any, **__: Any) -> None:
        """The connection is encrypted from its first byte: there is nothing to upgrade."""

    def abort(self) -> None:
        """Cut the line: what was not taken is not waited for."""
        if self._ws is not None:
            transport = self._ws.get_extra_info("transport")
            if transport is not None:
                transport.abort()

    async def readline(self) -> bytes:
        if self._ws is None:
            return b""
        data: bytes = await super().readline()  # type: ignore[no-untyped-call]
        return data

    async def drain(self) -> None:
        if self._ws is None:
            raise ConnectionResetError("the WebSocket is not open")
        await super().drain()  # type: ignore[no-untyped-call]

    async def wait_closed(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            if self._ws is not None:
                async with asyncio.timeout(2 * _CLOSE_S):
                    await self._close_task
        await self._client.close()
        self._ws = None

    def at_eof(self) -> bool:
        return self._ws is None or bool(self._ws.closed)

    def __bool__(self) -> bool:
        return self._ws is not None
