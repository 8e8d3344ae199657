"""TLS before a server that listens on loopback without it; what is behind never notices."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Final

MAX_LINES: Final = 256
HANDSHAKE_S: Final = 10.0
IDLE_S: Final = 900.0  # longer than any answer waits
_CHUNK: Final = 65_536


class TlsDoor:
    """Listens on `host` and `port`, and carries bytes to and from a port of loopback."""

    def __init__(
        self, host: str, port: int, target_port: int, certificate: Path, key: Path
    ) -> None:
        self._host, self._port, self._target_port = host, port, target_port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.load_cert_chain(certificate, key)
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises OSError if the port cannot be had."""
        self._server = await asyncio.start_server(
            self._accept, self._host, self._port, ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_S,
        )  # fmt: skip

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        if line is None or len(self._lines) >= MAX_LINES:
            writer.transport.abort()
            return
        self._lines.add(line)
        try:
            await self._carry(reader, writer)
        except (OSError, TimeoutError):
            pass  # either side has gone
        finally:
            self._lines.discard(line)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, out = await asyncio.open_connection("127.0.0.1", self._target_port)
        ways = {
            asyncio.create_task(_pump(reader, out)), asyncio.create_task(_pump(back, writer)),
        }  # fmt: skip
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):  # the last bytes
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
            out.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(IDLE_S):
            data = await source.read(_CHUNK)
            if not data:
                return
            sink.write(data)
            await sink.drain()
