"""One answer's stream from a Triton server, ended in words before it is cut.

Triton before 24.12 can die of a gRPC stream that is cancelled just as it answers. So who leaves
says so in the stream, to the model, and reads to the end; only a server that does not heed it, or
an agent that dies, cuts the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from cocoon.kernel.errors import CocoonError, DeadlineExceeded
from services.provider.backends.triton_wire import failed

READ_AHEAD: Final = 64  # replies that wait for a slow reader; gRPC's windows bound the rest
END_TIMEOUT_S: Final = 1.0
CUT_AFTER_S: Final = 2.0  # the server ends the stream by itself so much after our own deadline
BROKEN: Final = (grpc.RpcError, grpc.aio.UsageError, InferenceServerException, OSError)
_Inputs = dict[str, Any]


class TritonStream:
    """Sends `request`; `reply()` gives what comes; `end()` must follow. Times in seconds.

    `farewell` is the request that stops the first one. Belongs to the running event loop.
    """

    def __init__(
        self, client: InferenceServerClient, request: _Inputs, farewell: _Inputs,
        *, deadline_s: float, read_timeout_s: float, headers: dict[str, str] | None,
    ) -> None:  # fmt: skip
        self._request, self._farewell = request, farewell
        self._read_timeout_s = read_timeout_s
        self._until_s = asyncio.get_running_loop().time() + deadline_s
        self._leaving = asyncio.Event()
        self._stopped = False  # leaving before the end: the farewell is said
        self._arrived: asyncio.Queue[Any] = asyncio.Queue(READ_AHEAD)
        self._replies = client.stream_infer(
            self._requests(), stream_timeout=deadline_s + CUT_AFTER_S, headers=headers
        )
        self._pump = asyncio.create_task(self._read())

    async def reply(self) -> Any:
        """The next (result, error) of the server. Raises DeadlineExceeded, Unavailable."""
        left_s = self._until_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(left_s, self._read_timeout_s)):
                arrived = await self._arrived.get()
        except TimeoutError:
            if left_s <= self._read_timeout_s:
                raise DeadlineExceeded("The answer took too long; ask for less.") from None
            raise failed("The engine's server stopped speaking.") from None
        if isinstance(arrived, CocoonError):
            raise arrived
        return arrived

    async def end(self, *, whole: bool) -> None:
        """Leave: say farewell unless the answer is whole, and cut what does not end in time."""
        self._stopped = not whole
        self._leaving.set()
        while not self._arrived.empty():
            self._arrived.get_nowait()
        await asyncio.wait({self._pump}, timeout=END_TIMEOUT_S)
        if not self._pump.done():
            self._replies.cancel()
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        with contextlib.suppress(asyncio.QueueFull):  # whoever still waits for more
            self._arrived.put_nowait(failed("The engine has stopped."))

    async def _requests(self) -> AsyncIterator[_Inputs]:
        yield self._request
        await self._leaving.wait()
        if self._stopped:
            yield self._farewell

    async def _read(self) -> None:
        """Reading in a task of its own: to cancel a read would cancel the stream."""
        last: CocoonError = failed("The engine's server broke off.")
        try:
            async for reply in self._replies:
                if not self._leaving.is_set():
                    await self._arrived.put(reply)
        except BROKEN as error:
            last = broke(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # ours; otherwise the other end cancelled
            last = failed("The engine's server ended the answer.")
        if not self._leaving.is_set():
            await self._arrived.put(last)


def broke(error: Exception) -> CocoonError:
    """A failed call in our words: the server's own may quote what it was sent."""
    status = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("The answer took too long; ask for less.")
    name = status.name if status is not None else type(error).__name__
    return failed(f"The engine's server failed ({name}).")
