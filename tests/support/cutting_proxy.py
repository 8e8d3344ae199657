"""A TCP proxy that cuts connections where a test says, the way a bad network does."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns a close into a reset


@dataclass
class CuttingProxy:
    """Cut the next connections after so many bytes of answers; then let everything through.

    `cuts`: for each coming request in turn, after how many bytes of its answer the line breaks.
    `None` lets a request through.
    """

    url: str
    cuts: list[int | None] = field(default_factory=list)
    requests: int = 0
    broken: int = 0


@contextmanager
def cutting(target: str, path: str = "") -> Iterator[CuttingProxy]:
    """Proxy to `target` (an http:// URL) inside the block; `path` is added to the proxy's URL."""
    parts = urlsplit(target)
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = CuttingProxy(f"http://127.0.0.1:{listener.getsockname()[1]}{path}")
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection((parts.hostname or "", parts.port or 80), 10)
            upstream.settimeout(None)
            sockets.extend((client, upstream))
            pair = _Pair(proxy, client, upstream)
            for work in (pair.up, pair.down):
                thread = threading.Thread(target=work, daemon=True)
                threads.append(thread)
                thread.start()

    accepting = threading.Thread(target=serve, name="proxy")
    accepting.start()
    try:
        yield proxy
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(10)
        for item in sockets:
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        for item in sockets:
            item.close()


class _Pair:
    """One connection through the proxy: every request on it takes the next cut."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket, upstream: socket.socket) -> None:
        self._proxy, self._client, self._upstream = proxy, client, upstream
        self._cut: int | None = None
        self._sent = 0
        self._counted = False

    def up(self) -> None:
        with suppress(OSError):
            while data := self._client.recv(65536):
                if data.startswith((b"POST ", b"GET ")):
                    self._proxy.requests += 1
                    self._cut = self._proxy.cuts.pop(0) if self._proxy.cuts else None
                    self._sent = 0
                self._upstream.sendall(data)
        with suppress(OSError):
            self._upstream.shutdown(socket.SHUT_WR)

    def down(self) -> None:
        with suppress(OSError):
            while data := self._upstream.recv(65536):
                if self._cut is not None and self._sent + len(data) >= self._cut:
                    self._client.sendall(data[: self._cut - self._sent])
                    self._break()
                    return
                self._sent += len(data)
                self._client.sendall(data)
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def _break(self) -> None:
        self._proxy.broken += 1
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        for item in (self._client, self._upstream):
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
