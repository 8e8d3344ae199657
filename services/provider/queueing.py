"""One model's engine behind its queue: never more than its concurrency at once, first come first.

It starts with the agent, or at its first job, which waits for it. An engine that is stopped is
made anew when it is needed again, from files that are checked again. Who may join the queue is
decided before (jobs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from cocoon.chat import parse_chat_request, parse_embedding_request
from cocoon.kernel.errors import CocoonError, Unavailable
from cocoon.telemetry.logs import get_logger
from services.provider.backends.base import Backend, Embedder, Ended, Piece

_log = get_logger("cocoon.provider.queueing")
START_TIMEOUT_S: Final = 600.0  # large weights take minutes to load
PROBE_TIMEOUT_S: Final = 20.0
_PROBE: Final = b'{"model": "probe", "messages": [{"role": "user", "content": "hi"}]}'
_PROBE_INPUT: Final = b'{"model": "probe", "input": "hi"}'


class Engine:
    """`up` from a successful start to a stop. `running` and `waiting` are jobs."""

    def __init__(
        self, make: Callable[[], Backend | Embedder], concurrency: int,
        check: Callable[[], None] | None = None, *, checked: bool = True,
    ) -> None:  # fmt: skip
        """`check` raises if the files are not the model's any more; `checked`: they just were."""
        self._make = make
        self._check = check
        self._checked = checked
        self._concurrency = concurrency
        self._queue: deque[asyncio.Future[None]] = deque()
        self._changing = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None
        self._joined = 0  # running, waiting, or waiting for the start
        self.backend = make()
        self.up = False
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._joined - self.running

    @property
    def concurrency(self) -> int:
        return self._concurrency

    @concurrency.setter
    def concurrency(self, jobs: int) -> None:
        self._concurrency = jobs
        self._admit()

    async def start(self) -> None:
        """Be up. Raises ConfigurationError or Unavailable; a later try begins anew.

        One start for all who ask meanwhile. It goes on when they leave: the next will need it.
        """
        if self.up:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(_heard)
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        async with self._changing:
            if self.up:
                return
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    if self._check is not None and not self._checked:
                        await asyncio.to_thread(self._check)
                    self._checked = False
                    await self.backend.start()
                self.up = True
            except TimeoutError:
                raise Unavailable(
                    "The engine did not start in time; look at its own log."
                ) from None
            finally:
                if not self.up:
                    await self._renew()

    async def stop_if_idle(self) -> bool:
        """Free what the engine holds, if nobody needs it now. Returns whether it is down."""
        async with self._changing:
            if self._joined:
                return False
            if self.up:
                self.up = False
                await self._renew()
            return True

    async def _renew(self) -> None:
        former = self.backend
        try:
            self.backend = await asyncio.to_thread(self._make)
        finally:
            await former.close()

    async def close(self) -> None:
        """Whatever runs ends with Unavailable."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self.backend.close()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for the engine to be up and for a place in it. Cancel to leave the queue."""
        self._joined += 1
        try:
            if not self.up:
                await self._start_for_a_job()
            await self._enter()
            try:
                yield
            finally:
                self.running -= 1
                self._admit()
        finally:
            self._joined -= 1

    async def probe(self) -> bool:
        """Whether a token, or a vector, comes out of it, beside whatever it does.

        It is started for that.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self.start()
                return await _answers(self.backend)
        except (CocoonError, TimeoutError):
            return False

    async def _start_for_a_job(self) -> None:
        try:
            await self.start()
        except CocoonError as error:  # its sentence is the operator's, who has a log
            _log.warning("engine_not_started", code=error.code)
            raise Unavailable("The engine does not start; send the request again.") from None

    async def _enter(self) -> None:
        if self.running < self._concurrency and not self._queue:
            self.running += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came with the cancellation
                self.running -= 1
                self._admit()
            with contextlib.suppress(ValueError):
                self._queue.remove(turn)
            raise

    def _admit(self) -> None:
        while self._queue and self.running < self._concurrency:
            turn = self._queue.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)


def _heard(start: asyncio.Task[None]) -> None:
    """Nobody may be left to hear why it failed."""
    if not start.cancelled():
        start.exception()


async def _answers(backend: Backend | Embedder) -> bool:
    if isinstance(backend, Embedder):
        request = parse_embedding_request(_PROBE_INPUT)
        return bool((await backend.embed(request, max_input_tokens=64)).vectors)
    outputs = backend.generate(parse_chat_request(_PROBE), max_input_tokens=64, max_output_tokens=1)
    try:
        async for output in outputs:
            if isinstance(output, Piece | Ended):
                return True
    finally:
        await outputs.aclose()
    return False
