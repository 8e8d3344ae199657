"""Memory and file descriptors of every process over many jobs: flat, or it says which is not.

    .venv/bin/python -m benchmarks.soak [--jobs 100000] [--warm-up 40000] [--at-once 32]

Jobs (half of them streams) run through the whole network before the zero-work engine. The slope is
a least-squares line over what follows the warm-up, with its standard error. The warm-up has to fill
what is bounded by count: the event stream (100,000 events, five a job), SEALED (32,768 blobs), the
matcher's commands (32,768); and billing has to replay its log once (every 100,000 events).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.caller import Lines, Spec
from benchmarks.processes import process, wait_for
from benchmarks.zero_work_engine import MODEL
from cocoon.devnet.ports import free_port

SAMPLES = 100
LIMIT_KIB_PER_1000 = 64  # 6.4 MiB in a hundred thousand jobs
LIMIT_DESCRIPTORS = 8


class Watched:
    """One process: its name and what was read of it, a row for each sample."""

    def __init__(self, name: str, found: psutil.Process) -> None:
        self.name, self._process = name, found
        self.rows: list[tuple[int, float, int]] = []  # jobs done, MiB, descriptors

    def read(self, done: int) -> None:
        try:
            memory = self._process.memory_info().rss / 2**20
            self.rows.append((done, memory, self._process.num_fds()))
        except psutil.NoSuchProcess:
            pass

    def after(self, jobs: int) -> list[tuple[int, float, int]]:
        return [row for row in self.rows if row[0] > jobs]


def slope(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """A least-squares line's slope and its standard error."""
    found, start = statistics.linear_regression(xs, ys)
    left = sum((y - start - found * x) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    return found, (left / max(1, len(xs) - 2) / spread) ** 0.5


def report(processes: Sequence[Watched], warm_up: int) -> list[str]:
    """Print a line for each process; returns the names of those that grow."""
    print(f"{'MiB':12} {'first':>7} {warm_up:>7} {'last':>7} {'KiB / 1,000 jobs':>20} descriptors")
    growing = []
    for one in processes:
        rows = one.after(warm_up)
        jobs = [row[0] / 1000 for row in rows]
        kib, error = slope(jobs, [row[1] * 1024 for row in rows])
        opened = [row[2] for row in rows]
        files, _ = slope(jobs, opened)
        print(
            f"{one.name:12} {one.rows[0][1]:7.1f} {rows[0][1]:7.1f} {rows[-1][1]:7.1f}"
            f" {kib:10.1f} +- {error:6.1f}"
            f" {min(opened):4d} to {max(opened):3d}, {files:+.2f} / 1,000 jobs"
        )
        half = len(opened) // 2
        more = max(opened[half:]) - max(opened[:half])
        if kib - 2 * error > LIMIT_KIB_PER_1000 or more > LIMIT_DESCRIPTORS:
            growing.append(one.name)
    return growing


def watched(root: int) -> list[Watched]:
    """The network's processes by service; short-lived ones (key holders) are left out."""
    found = []
    for child in psutil.Process(root).children(recursive=True):
        words = child.cmdline()
        name = next((w.rpartition(".")[2] for w in words if w.startswith("services.")), "")
        if "cocoon.client" in words:
            name = "sidecar"
        if words and words[0].endswith("nats-server"):
            name = "nats"
        if name and name != "keyholder":
            found.append(Watched(name, child))
    return found


async def run_jobs(url: str, jobs: int, at_once: int, processes: list[Watched]) -> float:
    """Run `jobs` jobs and read the processes SAMPLES times; returns the seconds that it took."""
    kinds = [Lines(Spec(url, "any", stream=stream)) for stream in (False, True)]
    begun = done = 0
    every = max(1, jobs // SAMPLES)

    async def work() -> None:
        nonlocal begun, done
        while begun < jobs:
            begun += 1
            await kinds[begun % 2].ask()
            done += 1
            if done % every == 0:
                print(f"{done} of {jobs} jobs", file=sys.stderr)
                for one in processes:
                    one.read(done)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    took_s = time.perf_counter() - started
    for kind in kinds:
        await kind.close()
    return took_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=40_000)
    parser.add_argument("--at-once", type=int, default=32)
    chosen = parser.parse_args()
    if chosen.warm_up > chosen.jobs * 0.9:
        parser.error("a tenth of the jobs, at least, has to follow the warm-up")
    with ExitStack() as stack:
        port = free_port()
        engine = [sys.executable, "-m", "benchmarks.zero_work_engine", str(port)]
        stack.enter_context(process(engine))
        wait_for(port)
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="cocoon-soak-"))
        command = [
            sys.executable, "-m", "cocoon.cli", "up", "--json", "--data", str(Path(data) / "n"),
            "--gateway-port", "0", "--sidecar-port", "0",
            "--backend", f"http://127.0.0.1:{port}/v1", "--model", MODEL,
        ]  # fmt: skip
        network = stack.enter_context(process(command))
        assert network.stdout is not None
        ready = json.loads(network.stdout.readline())
        processes = watched(network.pid)
        took_s = asyncio.run(run_jobs(ready["sidecar"], chosen.jobs, chosen.at_once, processes))
    print(f"{chosen.jobs} jobs in {took_s:.0f} s, {chosen.jobs / took_s:.0f} a second")
    growing = report(processes, chosen.warm_up)
    print("grows: " + ", ".join(growing) if growing else "flat")
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
