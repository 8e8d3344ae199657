"""Memory and file descriptors of every process over many jobs: flat, or it says which is not.

    .venv/bin/python -m benchmarks.soak [--jobs 100000] [--at-once 32]

Jobs (half of them streams) run through the whole network before the zero-work engine. Resident
memory and descriptors are read as they go; the slope is a least-squares line over the second half,
when caches and pools have filled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.caller import Lines, Spec
from benchmarks.processes import process, wait_for
from benchmarks.zero_work_engine import MODEL
from cocoon.devnet.ports import free_port

SAMPLES = 40
LIMIT_KIB_PER_1000 = 64  # 6.4 MiB in a hundred thousand jobs


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

    def slope_kib(self) -> float:
        """KiB for each 1,000 jobs over the second half."""
        half = self.rows[len(self.rows) // 2 :]
        slope, _ = statistics.linear_regression([r[0] for r in half], [r[1] for r in half])
        return slope * 1024 * 1000


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
    parser.add_argument("--at-once", type=int, default=32)
    chosen = parser.parse_args()
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
    print(f"{'':12} {'first':>9} {'middle':>9} {'last':>9} {'KiB / 1,000 jobs':>17} {'fds':>11}")
    steep = []
    for one in processes:
        first, middle, last = one.rows[0], one.rows[len(one.rows) // 2], one.rows[-1]
        slope = one.slope_kib()
        print(
            f"{one.name:12} {first[1]:5.1f} MiB {middle[1]:5.1f} MiB {last[1]:5.1f} MiB"
            f" {slope:17.1f} {middle[2]:4d} to {last[2]:3d}"
        )
        if slope > LIMIT_KIB_PER_1000 or last[2] > middle[2] + 8:
            steep.append(one.name)
    print("grows: " + ", ".join(steep) if steep else "flat")
    return 1 if steep else 0


if __name__ == "__main__":
    sys.exit(main())
