"""Sealed transports under a stock OpenAI client: its HTTP never leaves the process unsealed.

Answers in the library of the request, httpx or httpx2, whichever the installed `openai` uses.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeVar

import httpx

from cocoon.client.door import LocalAnswer, LocalRequest
from cocoon.client.network import Network, NetworkOptions

CLOSE_TIMEOUT_S: Final = 10.0
_T = TypeVar("_T")


def _library(request: Any) -> Any:
    """The module, httpx or httpx2, that made this request."""
    return sys.modules[type(request).__module__.partition(".")[0]]


def _local_request(request: Any, body: bytes) -> LocalRequest:
    headers = {name.lower(): value for name, value in request.headers.items()}
    return LocalRequest(request.method, request.url.path, headers, body)


def _read_timeout_s(request: Any) -> float | None:
    timeout = request.extensions.get("timeout", {}).get("read")
    return None if timeout is None else float(timeout)


def _response(request: Any, answer: LocalAnswer, stream: Any) -> Any:
    return _library(request).Response(
        answer.status, headers=list(answer.headers), stream=stream, request=request
    )


class AsyncCocoonTransport(httpx.AsyncBaseTransport):
    """For `httpx.AsyncClient(transport=...)`. Use it on one event loop and close its client."""

    def __init__(self, options: NetworkOptions) -> None:
        self._options = options
        self._network: Network | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._network is None:
            self._network = Network(self._options)
        local = _local_request(request, await request.aread())
        timeout_s = _read_timeout_s(request)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._network.door.answer(local)
        except TimeoutError:
            raise _timed_out(request, timeout_s) from None
        stream = _async_stream_class(_library(request))(request, answer, timeout_s)
        response: httpx.Response = _response(request, answer, stream)
        return response

    async def aclose(self) -> None:
        network, self._network = self._network, None
        if network is not None:
            await network.aclose()


@cache
def _async_stream_class(library: Any) -> Any:
    class AsyncParts(library.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, request: Any, answer: LocalAnswer, timeout_s: float | None) -> None:
            self._request, self._answer, self._timeout_s = request, answer, timeout_s

        async def __aiter__(self) -> AsyncIterator[bytes]:
            parts = self._answer.parts
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise _timed_out(self._request, self._timeout_s) from None
                if part is None:
                    return
                yield part

        async def aclose(self) -> None:
            self._answer.close()

    return AsyncParts


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Loop:
    """One private thread with one event loop."""

    def __init__(self) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="cocoon-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T], timeout_s: float | None) -> _T:
        """Run to the end. Raises TimeoutError after cancelling what took too long."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if not future.cancel():
                return future.result()  # it ended just now
            raise TimeoutError from None
        except BaseException:
            future.cancel()
            raise

    def call(self, work: Any) -> None:
        """Run soon, and never after `close`: what it would free is gone with the loop."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def is_here(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class CocoonTransport(httpx.BaseTransport):
    """For `httpx.Client(transport=...)`: the asynchronous client on a private thread's loop.

    May be used from several threads. Close its client to end the thread; one that was not closed is
    closed with the program.
    """

    def __init__(self, options: NetworkOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._loop: _Loop | None = None
        self._network: Network | None = None
        self._end: weakref.finalize[Any, CocoonTransport] | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        loop, network = self._open()
        local = _local_request(request, request.read())
        timeout_s = _read_timeout_s(request)
        try:
            answer = loop.run(network.door.answer(local), timeout_s)
        except TimeoutError:
            raise _timed_out(request, timeout_s) from None
        stream = _sync_stream_class(_library(request))(request, answer, timeout_s, loop)
        response: httpx.Response = _response(request, answer, stream)
        return response

    def close(self) -> None:
        with self._lock:
            loop, network = self._loop, self._network
            self._loop = self._network = None
            if self._end is not None:
                self._end.detach()
        if loop is None or network is None:
            return
        try:
            loop.run(network.aclose(), CLOSE_TIMEOUT_S)
        finally:
            loop.close()

    def _open(self) -> tuple[_Loop, Network]:
        with self._lock:
            if self._loop is None or self._network is None:
                loop = _Loop()
                try:
                    self._network = loop.run(_open_network(self._options), CLOSE_TIMEOUT_S)
                except BaseException:
                    loop.close()
                    raise
                self._loop = loop
                self._end = weakref.finalize(self, _end, loop, self._network)
            return self._loop, self._network


def _end(loop: _Loop, network: Network) -> None:
    """Close what nobody closed. On the loop's own thread nothing can be waited for."""
    if loop.is_here():
        return
    with suppress(Exception):
        loop.run(network.aclose(), CLOSE_TIMEOUT_S)
        loop.close()


async def _open_network(options: NetworkOptions) -> Network:
    return Network(options)  # on its own loop


@cache
def _sync_stream_class(library: Any) -> Any:
    class Parts(library.SyncByteStream):  # type: ignore[misc]
        def __init__(
            self, request: Any, answer: LocalAnswer, timeout_s: float | None, loop: _Loop
        ) -> None:
            self._request, self._answer = request, answer
            self._timeout_s, self._loop = timeout_s, loop

        def __iter__(self) -> Iterator[bytes]:
            while True:
                try:
                    part = self._loop.run(_next(self._answer), self._timeout_s)
                except TimeoutError:
                    raise _timed_out(self._request, self._timeout_s) from None
                if part is None:
                    return
                yield part

        def close(self) -> None:
            self._loop.call(self._answer.close)

    return Parts


async def _next(answer: LocalAnswer) -> bytes | None:
    return await anext(answer.parts, None)


def _timed_out(request: Any, timeout_s: float | None) -> Exception:
    error: Exception = _library(request).ReadTimeout(
        f"No answer within {timeout_s} s.", request=request
    )
    return error


def transport(options: NetworkOptions) -> CocoonTransport:
    """A transport for `httpx.Client` (or httpx2's), under `openai.OpenAI(http_client=...)`."""
    return CocoonTransport(options)


def async_transport(options: NetworkOptions) -> AsyncCocoonTransport:
    """A transport for `httpx.AsyncClient` (or httpx2's), under `openai.AsyncOpenAI`."""
    return AsyncCocoonTransport(options)
