"""One child process: started in its own session, ready when it says so, ended with its parent.

Its stderr is its log file. Its stdout is one JSON line when it is ready, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoon.kernel.errors import Unavailable

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_PR_SET_PDEATHSIG = 1


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """What a child runs before exec so that a killed parent leaves no orphan (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(by))

    return arrange


class Child:
    """A service in a process. `start` may be called again after it has ended."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path
    ) -> None:
        self.name = name
        self.log_file = log_file
        self.ready: dict[str, Any] = {}
        self._command = list(command)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self._log_begins = 0  # where this start's part of the log does

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def exit_code(self) -> int | None:
        """Of the process that ended last; negative: the signal."""
        return self._process.returncode if self._process is not None else None

    async def start(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Start and wait for the ready line. Raises Unavailable with what it said about its end."""
        with self.log_file.open("ab") as log:
            self._log_begins = os.fstat(log.fileno()).st_size
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
            self.ready = json.loads(line)
        except TimeoutError:
            await self.stop()
            raise Unavailable(
                f"{self.name} was not ready within {timeout_s:.0f} s; {self._hint()}"
            ) from None
        except ValueError:
            code = await self._process.wait()
            if sentence := self._sentence():
                raise Unavailable(
                    f"{self.name} did not start: {sentence} (log: {self.log_file})"
                ) from None
            raise Unavailable(
                f"{self.name} did not start (exit code {code}); {self._hint()}"
            ) from None
        self._drain = asyncio.create_task(self._discard(self._process.stdout))
        return self.ready

    async def wait(self) -> int:
        """Wait for the end; return the exit code (negative: the signal)."""
        assert self._process is not None  # noqa: S101 - started by the caller
        return await self._process.wait()

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL to the whole session after `timeout_s`."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                self.kill()
                await process.wait()
        if self._drain is not None:
            await asyncio.gather(self._drain, return_exceptions=True)
            self._drain = None

    def kill(self) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _hint(self) -> str:
        return f"its last words are in {self.log_file}:\n{self.last_words()}"

    def last_words(self, lines: int = 4) -> str:
        """The end of the log since this start, for a person."""
        said = deque(self._said(), lines)
        return "\n".join(f"  {line[:400]}" for line in said) or "  (nothing)"

    def _sentence(self) -> str:
        """The plain sentence with which a service ends; empty without one."""
        begins = f"{self.name.partition('-')[0]}: "
        plain = [line for line in self._said() if line.startswith(begins)]
        return plain[-1].removeprefix(begins)[:1000] if plain else ""

    def _said(self) -> list[str]:
        try:
            with self.log_file.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(self._log_begins, log.tell() - 8192))
                return log.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return []

    @staticmethod
    async def _discard(stream: asyncio.StreamReader) -> None:
        while await stream.read(4096):
            pass
