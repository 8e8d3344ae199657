"""What ends is started again: each part by itself and at once, but not for ever.

Services are started only while the servers run that they need. A start that fails counts like an
end; whoever ends too often ends the network, with a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cocoon.kernel.errors import CocoonError, Unavailable

RESTARTS, RESTARTS_WITHIN_S = 5, 60.0
POLL_S = 0.02  # where the kernel does not tell of an end, and while servers are awaited
REAPED_S = 0.001
FAILED_PAUSE_S = 0.25
LOOK_S, LOOKS = 1.0, 3  # whoever says so often that it is ill is started anew


@dataclass(slots=True)
class Part:
    """A process to be kept: a server, or a service that needs the servers."""

    name: str
    log: Path  # where a person finds its last words
    pid: Callable[[], int | None]
    start: Callable[[], Awaitable[object]]
    is_server: bool = False
    is_ill: Callable[[], bool] | None = None  # blocking; asked only while it runs
    end: Callable[[], object] | None = None  # blocking: how an ill one is stopped
    exit_code: Callable[[], int | None] = lambda: None  # of the process that ended last
    starting: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # never started while it is stopped
    ended_s: deque[float] = field(default_factory=lambda: deque(maxlen=RESTARTS))


async def in_thread(work: Callable[[], object]) -> None:
    """Run blocking work in a thread. A cancellation waits for it: a thread cannot be cut off."""
    running = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def until_ended(pid: Callable[[], int | None]) -> None:
    """Return as soon as the process has ended; at once if there is none."""
    number = pid()
    if number is None:
        return
    pause_s = POLL_S
    with contextlib.suppress(AttributeError, OSError):  # not this kernel, or it has ended meanwhile
        descriptor = os.pidfd_open(number)
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, told.set)
        try:
            await told.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        pause_s = REAPED_S
    while pid() is not None:  # noqa: ASYNC110 - whoever reaps it comes after the kernel's word
        await asyncio.sleep(pause_s)


def how_ended(exit_code: int | None) -> str:
    """Why a process ended, in brackets; nothing where it is not known."""
    if exit_code is None:
        return ""
    return f" (exit code {exit_code})" if exit_code >= 0 else f" (signal {-exit_code})"


class Supervisor:
    """Keeps parts running. `changed` is called after each restart."""

    def __init__(
        self, parts: Sequence[Part], say: Callable[[str], None], changed: Callable[[], None]
    ) -> None:
        self._parts, self._say, self._changed = parts, say, changed
        self._servers = [part for part in parts if part.is_server]

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. Raises Unavailable when a part keeps ending."""
        keeping = [asyncio.create_task(self._keep(part), name=part.name) for part in self._parts]
        keeping += [
            asyncio.create_task(self._look_after(part, part.is_ill, part.end))
            for part in self._parts
            if part.is_ill and part.end
        ]
        stopping = asyncio.create_task(_wait(stop))
        try:
            await asyncio.wait({stopping, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in keeping:
                if task.done():
                    task.result()
        finally:
            for task in (stopping, *keeping):
                task.cancel()
            await asyncio.gather(stopping, *keeping, return_exceptions=True)

    async def _keep(self, part: Part) -> None:
        failed, began_s = False, 0.0
        while True:
            if not failed:
                await until_ended(part.pid)
                began_s = asyncio.get_running_loop().time()
            self._count(part)
            cause = how_ended(part.exit_code())
            self._say(f"{part.name} has stopped{cause}; starting it again (log: {part.log})")
            part.starting = True
            try:
                if not part.is_server:
                    await self._servers_run()
                async with part.turn:
                    await part.start()
            except CocoonError as error:
                failed = True
                self._say(error.message)
                await asyncio.sleep(FAILED_PAUSE_S)
            else:
                failed = False
                self._changed()
                lasted_s = asyncio.get_running_loop().time() - began_s
                self._say(f"{part.name} is up again ({lasted_s:.1f} s)")
            finally:
                part.starting = False

    async def _look_after(
        self, part: Part, is_ill: Callable[[], bool], end: Callable[[], object]
    ) -> None:
        ill, was_well = 0, True
        while True:
            await asyncio.sleep(LOOK_S)
            if part.pid() is None or part.starting:
                ill = 0
                continue
            ill = ill + 1 if await asyncio.to_thread(is_ill) else 0
            was_well = was_well or not ill
            if ill >= LOOKS and was_well and not part.starting:
                self._say(f"{part.name} says that it is ill")
                async with part.turn:
                    await in_thread(end)
                ill, was_well = 0, False  # what a start does not mend, the next one does not

    async def _servers_run(self) -> None:
        def away() -> bool:
            return any(server.starting or server.pid() is None for server in self._servers)

        while away():  # noqa: ASYNC110 - a process's end sets no event of ours
            await asyncio.sleep(POLL_S)

    def _count(self, part: Part) -> None:
        now_s = asyncio.get_running_loop().time()
        recent = part.ended_s
        if len(recent) == recent.maxlen and now_s - recent[0] < RESTARTS_WITHIN_S:
            raise Unavailable(
                f"{part.name} keeps stopping: {len(recent)} times within "
                f"{RESTARTS_WITHIN_S:.0f} s. What it said last is in {part.log}"
            )
        recent.append(now_s)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
