"""The supervisor on real processes: it starts again what ends, waits for servers, and gives up."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from cocoon.devnet.supervising import (
    LOOK_S,
    LOOKS,
    RESTARTS,
    Part,
    Supervisor,
    in_thread,
)
from cocoon.kernel.errors import Unavailable

PYTHON = [sys.executable, "-S", "-c"]
FOR_LONG, AT_ONCE = "import time; time.sleep(600)", "pass"


class Program:
    """A process that a part keeps. `starts` counts, and `refuses` lets that many of them fail."""

    def __init__(self, script: str = FOR_LONG, refuses: int = 0) -> None:
        self.script, self.refuses, self.starts = script, refuses, 0
        self.process: asyncio.subprocess.Process | None = None

    def pid(self) -> int | None:
        process = self.process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        self.starts += 1
        if self.refuses:
            self.refuses -= 1
            raise Unavailable("not yet")
        self.process = await asyncio.create_subprocess_exec(*PYTHON, self.script)

    def kill(self) -> None:
        pid = self.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def part(self, name: str, *, is_server: bool = False) -> Part:
        return Part(
            name, Path("log"), self.pid, self.start, is_server,
            exit_code=lambda: self.process.returncode if self.process else None,
        )  # fmt: skip


async def until(enough: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not enough():  # noqa: ASYNC110 - a process sets no event of ours
            await asyncio.sleep(0.01)


@asynccontextmanager
async def kept(*parts: Part) -> AsyncIterator[tuple[list[str], asyncio.Task[None]]]:
    """Supervise inside the block; what was said, and the supervisor's task."""
    said: list[str] = []
    stop = asyncio.Event()
    task = asyncio.create_task(Supervisor(parts, said.append, lambda: None).run(stop))
    try:
        yield said, task
    finally:
        stop.set()
        with suppress(Unavailable):
            await task


@asynccontextmanager
async def running(*programs: Program) -> AsyncIterator[None]:
    for program in programs:
        await program.start()
    try:
        yield
    finally:
        for program in programs:
            if program.process is not None:
                with suppress(ProcessLookupError):
                    program.process.kill()
                await program.process.wait()


async def test_whatever_is_killed_runs_again_and_the_others_are_left_alone() -> None:
    one, two = Program(), Program()
    async with running(one, two), kept(one.part("one"), two.part("two")) as (said, _):
        untouched, first = two.pid(), one.pid()
        one.kill()
        await until(lambda: one.pid() not in (None, first))

        assert two.pid() == untouched
        await until(lambda: len(said) == 2)
        assert said[0] == "one has stopped (signal 9); starting it again (log: log)"
        assert re.fullmatch(r"one is up again \(\d+\.\d s\)", said[1])


async def test_an_exit_code_is_told_like_a_signal() -> None:
    program = Program("raise SystemExit(3)")
    async with running(program), kept(program.part("one")) as (said, _):
        program.script = FOR_LONG
        await until(lambda: len(said) == 2)
        assert said[0] == "one has stopped (exit code 3); starting it again (log: log)"


async def test_a_start_that_fails_is_tried_again() -> None:
    program = Program()
    async with running(program), kept(program.part("one")) as (said, _):
        program.refuses = 2
        program.kill()
        await until(lambda: program.starts == 4 and program.pid() is not None)

        await until(lambda: "one is up again" in said[-1])
        assert said.count("not yet") == 2


async def test_a_service_waits_for_the_servers_that_it_needs() -> None:
    server, service = Program(), Program()
    began, order = asyncio.Event(), []

    async def slow_start() -> None:
        began.set()
        await asyncio.sleep(0.2)
        await server.start()
        order.append("server")

    async def start() -> None:
        await service.start()
        order.append("service")

    parts = (
        Part("server", Path("log"), server.pid, slow_start, is_server=True),
        Part("service", Path("log"), service.pid, start),
    )
    async with running(server, service), kept(*parts):
        server.kill()
        await began.wait()
        service.kill()
        await until(lambda: len(order) == 2)

        assert order == ["server", "service"]


async def test_what_says_that_it_is_ill_is_started_anew() -> None:
    program = Program()
    part = program.part("one", is_server=True)
    part.is_ill, part.end = lambda: True, program.kill
    async with running(program), kept(part) as (said, _):
        first = program.pid()
        await until(lambda: program.pid() not in (None, first))
        second = program.pid()
        await asyncio.sleep((LOOKS + 2) * LOOK_S)

        assert said[0] == "one says that it is ill"
        assert program.pid() == second  # it is ill still: another start would mend nothing


async def test_what_keeps_ending_ends_the_network_with_a_sentence() -> None:
    program = Program(AT_ONCE)
    async with running(program), kept(program.part("the one")) as (_, task):
        with pytest.raises(Unavailable, match="the one keeps stopping: 5 times within 60 s"):
            await asyncio.wait_for(task, 30)
    assert program.starts == 1 + RESTARTS


async def test_work_in_a_thread_is_waited_for_when_it_is_cancelled() -> None:
    import threading

    begun, go, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go.wait(10)
        done.append(True)

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]
