"""An event loop whose time is simulated: one step runs the next due event and all that follows.

Tasks and timers belong to a process of the simulated world. A killed process's are never run
again, as after kill -9; a frozen one's are kept until it is thawed, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

START_S = 1000.0  # the monotonic clock at the beginning
MAX_READY = 100_000  # callbacks of one step: more is a loop that never waits


class Process:
    """What dies or stands still as one."""

    def __init__(self, name: str, number: int = 0) -> None:
        self.name = f"{name}_{number}"
        self.alive = True
        self.frozen = False
        self.backlog: deque[asyncio.Handle] = deque()

    def __repr__(self) -> str:
        return self.name


WORLD = Process("world")
_process: contextvars.ContextVar[Process] = contextvars.ContextVar("process", default=WORLD)


def current_process() -> Process:
    return _process.get()


class SimLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as the services use; nothing in it looks at the machine's clock."""

    def __init__(self) -> None:
        self.now_s = START_S
        self.steps: Counter[str] = Counter()  # by what caused them
        self.errors: list[str] = []
        self.closing = False
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, str, asyncio.Handle]] = []
        self._sequence = 0
        self._tasks: list[asyncio.Task[Any]] = []  # a dead process's too: they end with the world
        self._prune_at = 256

    # ---- what the world asks ----

    def step(self) -> str | None:
        """Run the next due event of a living process; what it was, None if nothing is left."""
        while self._timers:
            when, _, label, handle = heapq.heappop(self._timers)
            if handle.cancelled():
                continue
            process = _owner(handle)
            if not process.alive:
                continue
            self.now_s = max(self.now_s, when)
            if process.frozen:
                process.backlog.append(handle)
                continue
            self._run(handle)
            self.drain()
            self.steps[label.partition(" ")[0]] += 1
            return label
        return None

    def drain(self) -> None:
        """Run what is ready until nothing is."""
        for _ in range(MAX_READY):
            if not self._ready:
                return
            handle = self._ready.popleft()
            process = _owner(handle)
            if handle.cancelled() or not process.alive:
                continue
            if process.frozen:
                process.backlog.append(handle)
            else:
                self._run(handle)
        raise RuntimeError("a step of the simulation does not end")

    def close(self) -> None:
        """End every task, the dead processes' too, so that nothing is left half done."""
        self.closing = True
        for _ in range(5):
            for task in self._tasks:
                task.cancel()
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    self._run(handle)
        self._timers.clear()
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if not task.done():  # its first step was dropped with its process
                task.get_coro().close()  # type: ignore[union-attr]

    def thaw(self, process: Process) -> None:
        process.frozen = False
        while process.backlog:
            self._ready.append(process.backlog.popleft())

    def at(self, delay_s: float, label: str, call: Callable[..., Any], *args: Any,
           process: Process = WORLD) -> asyncio.Handle:  # fmt: skip
        """Schedule an event of the world under a process; `label` says what it is."""
        context = contextvars.copy_context()
        context.run(_process.set, process)
        handle = asyncio.Handle(call, args, self, context)
        self._push(self.now_s + max(0.0, delay_s), label, handle)
        return handle

    def run_as(self, process: Process, call: Callable[..., Any], *args: Any) -> Any:
        """Call at once under a process: the tasks that it makes are the process's."""
        context = contextvars.copy_context()
        context.run(_process.set, process)
        return context.run(call, *args)

    def _push(self, when: float, label: str, handle: asyncio.Handle) -> None:
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, label, handle))

    def _run(self, handle: asyncio.Handle) -> None:
        handle._run()

    # ---- what asyncio asks ----

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._push(when, "timer", handle)
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays in the heap until it is due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        if len(self._tasks) >= self._prune_at:
            self._tasks = [kept for kept in self._tasks if not kept.done()]
            self._prune_at = 2 * len(self._tasks) + 256
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        """A thread's work is done at once and heard of later: a crash may come between."""
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - it is the caller's
            self.call_later(0.001, _fail, future, error)
        else:
            self.call_later(0.001, _resolve, future, result)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.closing and error is not None:
            self.errors.append(f"{context.get('message')}: {error!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False


def _owner(handle: asyncio.Handle) -> Process:
    return handle._context.get(_process, WORLD)  # type: ignore[attr-defined]


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
