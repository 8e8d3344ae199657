"""uvicorn with the bounds that it lacks: heads, connections, queued requests, slow readers.

It changes nothing of HTTP itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.http import ABORT, CUT
from services.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from services.gateway.routes import Routes

_BACKLOG = 1024
_LINGER_BYTES = 16 * 1024 * 1024  # of a body whose request was answered already
_LINGER_S = 5.0
_MAX_PIPELINED = 16  # requests of one connection that wait for the answer before theirs
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


def _bounded(settings: GatewaySettings) -> type[HttpToolsProtocol]:
    """A protocol class that keeps to these settings."""

    class Bounded(HttpToolsProtocol):
        """One connection. A head that is too large or too slow ends it, and so does a reader that
        leaves what was written for longer than `send_timeout_s`, whatever the answer is.
        """

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None
        _lingered_bytes = 0
        _linger_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _close_timer: asyncio.TimerHandle | None = None
        _running: RequestResponseCycle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
                return
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_ended()
            self._linger_ended()
            for timer in (self._write_timer, self._close_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)
            if self._running is not None:  # uvicorn tells only the newest of queued requests
                self._running.disconnected = not self._running.response_complete
                self._running.message_event.set()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None
            super().resume_writing()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._close()

        def timeout_keep_alive_handler(self) -> None:
            self._close()

        def _close(self) -> None:
            """Close once everything is read, or when that takes too long."""
            self.transport.close()
            if self._close_timer is None:
                self._close_timer = self.loop.call_later(
                    settings.send_timeout_s, self.transport.abort
                )

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            self._expect_head()
            self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]
            self.scope[CUT] = self._close  # type: ignore[typeddict-unknown-key]

        def on_url(self, url: bytes) -> None:
            if self._fits(len(url)):
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._fits(len(name) + len(value)):
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_ended()
            if self._head_bytes <= settings.max_header_bytes:
                super().on_headers_complete()
                if len(self.pipeline) > _MAX_PIPELINED:
                    self.transport.abort()
                elif self.pipeline:
                    self.flow.resume_reading()  # or nobody would see this client leave

        def on_body(self, body: bytes) -> None:
            if self._head_bytes > settings.max_header_bytes:
                return
            if not self.cycle.response_complete:
                super().on_body(body)
                return
            # Refused before it was read: closing now would take the answer away from the client.
            self._lingered_bytes += len(body)
            if self._lingered_bytes > _LINGER_BYTES:
                self.transport.abort()
            elif self._linger_timer is None:
                self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

        def on_message_complete(self) -> None:
            self._linger_ended()
            if self._head_bytes <= settings.max_header_bytes:
                super().on_message_complete()

        def _linger_ended(self) -> None:
            self._lingered_bytes = 0
            if self._linger_timer is not None:
                self._linger_timer.cancel()
                self._linger_timer = None

        def _fits(self, size: int) -> bool:
            fitted = self._head_bytes <= settings.max_header_bytes
            self._head_bytes += size + 4
            if self._head_bytes <= settings.max_header_bytes:
                return True
            if fitted and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self._close()
            return False

        def _expect_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(settings.header_timeout_s, self._close)

        def _head_ended(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Bounded


class _Server(uvicorn.Server):
    """Signals belong to the process, not to this server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve_http(routes: Routes, settings: GatewaySettings) -> AsyncIterator[int]:
    """Serve inside the block and yield the bound port; then drain. Raises OSError."""
    listener = socket.create_server(
        (settings.listen_host, settings.listen_port), backlog=_BACKLOG, reuse_port=False
    )
    # Accepted sockets inherit it: a small frame must not wait for the last one's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options: dict[str, Any] = {
        "http": _bounded(settings),
        "loop": "none",
        "ws": "none",
        "lifespan": "off",
        "interface": "asgi3",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": settings.keep_alive_s,
        "timeout_graceful_shutdown": settings.drain_s,
    }
    server = _Server(uvicorn.Config(routes, **options))
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        while not server.started:
            if task.done():
                task.result()
            await asyncio.sleep(0.005)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=settings.drain_s + 5)
        listener.close()
