"""What the path adds: Cocoon whole, and LiteLLM's proxy, both before the same zero-work engine.

    .venv/bin/python -m benchmarks.path [--rounds 5] [--requests 60] [--seconds 6]

One run, all arms in turn, several rounds; the figure is the median of rounds. Added time to first
token: streams, one at a time, 50 ms apart, so that the end of one job is not part of the next
one's time. Jobs a second: 32 bodies at once. CPU a job: every process of the arm, without the
caller, which is the same for all. LiteLLM is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from benchmarks.zero_work_engine import MODEL
from cocoon.devnet.ports import accepts, free_port

ROOT = Path(__file__).resolve().parent.parent
LITELLM = "litellm[proxy]==1.106.0"
MESSAGES = [{"role": "user", "content": "How much does the path add? " * 20}]
AT_ONCE = 32
PAUSE_S = 0.05


@dataclass
class Arm:
    """One way to the engine: its OpenAI address, its key, and the processes that it needs."""

    name: str
    url: str
    key: str
    roots: list[int]
    first_token_ms: list[float] = field(default_factory=list)  # a round's median
    all_ms: list[float] = field(default_factory=list)
    jobs_per_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def cpu_s(self) -> float:
        total = 0.0
        for root in self.roots:
            try:
                tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
                total += sum(sum(p.cpu_times()[:2]) for p in tree)
            except psutil.NoSuchProcess:
                continue
        return total


def body(*, stream: bool) -> bytes:
    value: dict[str, object] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 64}
    if stream:
        value["stream"] = True
    return json.dumps(value).encode()


async def first_token_ms(arm: Arm, requests: int) -> list[float]:
    """Times from sending a request to the first chunk with content, one request at a time."""
    times = []
    sent = body(stream=True)
    async with client(arm) as http:
        for _ in range(requests):
            await asyncio.sleep(PAUSE_S)
            began = time.perf_counter()
            seen, first = b"", None
            async with http.post(f"{arm.url}/chat/completions", data=sent) as got:
                got.raise_for_status()
                async for chunk in got.content.iter_any():
                    seen += chunk
                    if first is None and b"word " in seen:
                        first = time.perf_counter() - began
            if first is None:
                raise RuntimeError(f"{arm.name} streamed no token")
            times.append(first * 1000)
    return times


async def throughput(arm: Arm, seconds: float) -> tuple[float, float]:
    """(jobs a second, CPU microseconds a job) at AT_ONCE requests at once."""
    done = 0
    sent = body(stream=False)
    end = time.perf_counter() + seconds

    async def work(http: aiohttp.ClientSession) -> None:
        nonlocal done
        while time.perf_counter() < end:
            async with http.post(f"{arm.url}/chat/completions", data=sent) as answer:
                answer.raise_for_status()
                await answer.read()
            done += 1

    async with client(arm) as http:
        before, began = arm.cpu_s(), time.perf_counter()
        await asyncio.gather(*(work(http) for _ in range(AT_ONCE)))
        took, cpu = time.perf_counter() - began, arm.cpu_s() - before
    return done / took, cpu / done * 1e6


def client(arm: Arm, connections: int = AT_ONCE) -> aiohttp.ClientSession:
    """The caller: cheaper than a stock SDK, so that the arms are what is measured."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {arm.key}", "Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=30),
        connector=aiohttp.TCPConnector(limit=connections),
    )


@contextmanager
def process(
    command: list[str], *, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.terminate()
        started.wait(30)
        if started.stdout:
            started.stdout.close()


def wait_for(port: int, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not accepts(port):
        if time.monotonic() > end:
            raise RuntimeError(f"nothing listens on port {port}")
        time.sleep(0.1)


def litellm_command(folder: Path, engine: str, port: int) -> list[str]:
    """LiteLLM's proxy in its own environment, one worker, as its documentation runs it."""
    python = folder / "litellm" / "bin" / "python"
    if not python.exists():
        print("installing LiteLLM into an environment of its own ...", file=sys.stderr)
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run(
            [uv, "venv", "-q", "--python", sys.executable, str(folder / "litellm")], check=True
        )
        subprocess.run([uv, "pip", "install", "-q", "--python", str(python), LITELLM], check=True)
    config = folder / "litellm.yaml"
    config.write_text(
        json.dumps(
            {
                "model_list": [
                    {
                        "model_name": MODEL,
                        "litellm_params": {
                            "model": f"openai/{MODEL}",
                            "api_base": engine,
                            "api_key": "none",
                        },
                    }
                ],
                "general_settings": {"master_key": "sk-bench"},
            }
        )
    )
    return [
        str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1",
        "--port", str(port), "--num_workers", "1",
    ]  # fmt: skip


def report(arms: list[Arm]) -> dict[str, object]:
    direct = statistics.median(arms[0].first_token_ms)
    rows = {}
    print(f"{'':10} {'first token':>12} {'p99':>9} {'added':>10} {'jobs/s':>7} {'CPU a job':>12}")
    for arm in arms:
        first, jobs, cpu = (
            statistics.median(v) for v in (arm.first_token_ms, arm.jobs_per_s, arm.cpu_us)
        )
        p99 = statistics.quantiles(arm.all_ms, n=100)[98]
        rows[arm.name] = {
            "first_token_ms": first, "first_token_p99_ms": p99, "added_ms": first - direct,
            "jobs_per_s": jobs, "cpu_us": cpu,
        }  # fmt: skip
        print(
            f"{arm.name:10} {first:9.2f} ms {p99:6.1f} ms {first - direct:7.2f} ms {jobs:7.0f}"
            f" {cpu:9.0f} us"
        )
    added = [statistics.median(arm.first_token_ms) - direct for arm in arms]
    print(f"Cocoon adds {added[2] / added[1]:.2f} times what LiteLLM adds to the first token")
    return {"arms": rows, "added_ratio": added[2] / added[1], "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cocoon-bench", help="LiteLLM's environment"
    )
    chosen = parser.parse_args()
    chosen.folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        engine_port, litellm_port = free_port(), free_port()
        engine_url = f"http://127.0.0.1:{engine_port}/v1"
        engine = stack.enter_context(
            process([sys.executable, "-m", "benchmarks.zero_work_engine", str(engine_port)])
        )
        wait_for(engine_port)
        litellm = stack.enter_context(
            process(
                litellm_command(chosen.folder, engine_url, litellm_port),
                env={"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR",
                     "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"},
            )
        )  # fmt: skip
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="cocoon-bench-"))
        cocoon = stack.enter_context(
            process([
                sys.executable, "-m", "cocoon.cli", "up", "--json", "--data", f"{data}/network",
                "--gateway-port", "0", "--sidecar-port", "0", "--backend", engine_url,
                "--model", MODEL,
            ])
        )  # fmt: skip
        assert cocoon.stdout is not None
        ready = json.loads(cocoon.stdout.readline())
        wait_for(litellm_port)
        arms = [
            Arm("engine", engine_url, "none", [engine.pid]),
            Arm("LiteLLM", f"http://127.0.0.1:{litellm_port}/v1", "sk-bench", [litellm.pid]),
            Arm("Cocoon", ready["sidecar"], "any", [cocoon.pid]),
        ]
        for arm in arms:  # warm up
            asyncio.run(first_token_ms(arm, 20))
            asyncio.run(throughput(arm, 2))
        for turn in range(chosen.rounds):
            print(f"round {turn + 1} of {chosen.rounds}", file=sys.stderr)
            for arm in arms:
                times = asyncio.run(first_token_ms(arm, chosen.requests))
                arm.first_token_ms.append(statistics.median(times))
                arm.all_ms += times
            for arm in arms:
                jobs, cpu = asyncio.run(throughput(arm, chosen.seconds))
                arm.jobs_per_s.append(jobs)
                arm.cpu_us.append(cpu)
        figures = report(arms)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
