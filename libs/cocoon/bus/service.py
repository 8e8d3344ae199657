"""How every service process runs: settings, logs, traces, one event loop, a clean end.

stdout carries one JSON line when the service is ready; logs go to stderr.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import uvloop
from pydantic import ValidationError

from cocoon.kernel.errors import CocoonError, ConfigurationError
from cocoon.telemetry.logs import configure_logs, get_logger
from cocoon.telemetry.tracing import configure_tracing

log = get_logger("cocoon.service")
_GC_OBJECTS = 20_000  # allocated and not freed, about 2 MiB, before young cycles are looked for


class ServiceSettings(Protocol):
    """What every service's settings have."""

    @property
    def otlp_endpoint(self) -> str | None: ...

    @property
    def log_level(self) -> str: ...


class Stop:
    """Asks the process to end: for a signal without an error, for a Fatal with it."""

    def __init__(self) -> None:
        self.error: CocoonError | None = None
        self._event = asyncio.Event()
        self._again = asyncio.Event()

    def signalled(self) -> None:
        """A signal came: end in order, and at the second one at once."""
        if self._event.is_set():
            self._again.set()
        self()

    def __call__(self, error: CocoonError | None = None) -> None:
        if error is not None and self.error is None:
            self.error = error
            log.critical("service_stops", code=error.code, exc_info=error)
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()

    async def wait_again(self) -> None:
        """Until a signal comes while the process ends already."""
        await self._again.wait()

    def watch(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Stop the process if a task that should run for ever ends."""
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._event.is_set():
            return
        error = task.exception()
        known = error if isinstance(error, CocoonError) else None
        if known is None:
            log.critical("task_died", exc_info=error)
        self(known or ConfigurationError(f"the task {task.get_name()} ended"))


S = TypeVar("S", bound=ServiceSettings)


def announce_ready(service: str, **details: object) -> None:
    """Tell the parent process, once: {"ready": service, ...}.

    What was loaded until now stays: the garbage collector need not look at it again, and it looks
    for cycles less often than a script needs (its default costs a twentieth of a job's CPU).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_OBJECTS, 20, 20)
    print(json.dumps({"ready": service, **details}), flush=True)  # noqa: T201 - the protocol


def run(service: str, load: Callable[..., S], body: Callable[[S, Stop], Awaitable[None]]) -> None:
    """Run `body(settings, stop)` until it returns; it returns soon after `stop` is set.

    Exits with 0 after a signal, 1 after a Fatal, 2 for bad settings (named on stderr).
    """
    try:
        settings = load()
    except ValidationError as error:
        names = ", ".join(".".join(str(part) for part in e["loc"]) for e in error.errors())
        print(f"{service}: missing or wrong settings: {names}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    configure_logs(service, settings.log_level)
    flush = configure_tracing(service, settings.otlp_endpoint)
    try:
        code = uvloop.run(_body(service, settings, body))
    finally:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)  # it ends already; a second one must not cut it off
        flush()
    sys.exit(code)


async def _body(service: str, settings: S, body: Callable[[S, Stop], Awaitable[None]]) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.signalled)
    try:
        await body(settings, stop)
    except CocoonError as error:
        log.critical("service_failed", code=error.code, exc_info=error)
        print(f"{service}: {error.message}", file=sys.stderr)  # noqa: T201 - for a person
        return 1
    return 1 if stop.error is not None else 0
