"""Processes that a benchmark starts, and what CPU each group of them has used."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from cocoon.devnet.ports import accepts

ROOT = Path(__file__).resolve().parent.parent
Groups = Mapping[str, frozenset[int]]  # a name -> the roots of its processes


@contextmanager
def process(
    command: list[str], *, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process for as long as the block; its stdout can be read, its stderr is dropped."""
    started = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait(10)
        for pipe in (started.stdin, started.stdout):
            if pipe:
                pipe.close()


def wait_for(port: int, seconds: float = 180) -> None:
    """Until something listens on the port. Raises RuntimeError."""
    end = time.monotonic() + seconds
    while not accepts(port):
        if time.monotonic() > end:
            raise RuntimeError(f"nothing listens on port {port}")
        time.sleep(0.1)


def cpu_s(groups: Groups) -> dict[str, float]:
    """CPU seconds of each group so far: its roots and their children, but for other groups'."""
    taken = {root: name for name, roots in groups.items() for root in roots}
    used = dict.fromkeys(groups, 0.0)
    for root, name in taken.items():
        try:
            found = psutil.Process(root)
            waiting = [found]
            while waiting:
                one = waiting.pop()
                used[name] += _cpu_s(one)
                waiting += [c for c in one.children() if c.pid not in taken]
        except psutil.NoSuchProcess:
            continue
    return used


def _cpu_s(one: psutil.Process) -> float:
    """Own time and that of children that have ended."""
    try:
        times = one.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def machine_busy_s() -> float:
    """CPU seconds that the machine has spent, on anything, since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def network_groups(pids: Mapping[str, int | None], supervisor: int) -> dict[str, frozenset[int]]:
    """A network's processes by service; key holders apart from the providers that started them."""
    groups: dict[str, set[int]] = {"supervisor": {supervisor}}
    for name, pid in pids.items():
        if pid is None:
            continue
        service = next((s for s in ("provider", "matcher") if name.startswith(s)), name)
        groups.setdefault(service, set()).add(pid)
        for child in psutil.Process(pid).children(recursive=True):
            if any(word.endswith("keyholder") for word in child.cmdline()):
                groups.setdefault("key holder", set()).add(child.pid)
    return {name: frozenset(found) for name, found in groups.items()}
