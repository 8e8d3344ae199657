"""Where the time to the first token goes: the stages of one stream at a time, from its traces.

A network of its own with tracing on (which costs a little everywhere), one request each 50 ms
through the sidecar. Every process tells when its span began, the engine puts its two times into
the first word, and all read one clock.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.arms import start_network
from benchmarks.caller import TIMEOUT_S, Spec
from benchmarks.processes import process, wait_for
from benchmarks.report import Column, Finding, Question, Rows
from benchmarks.zero_work_engine import WORD
from cocoon.devnet.ports import free_port
from tests.support.otlp_collector import collecting

WARM_UP, PAUSE_S, EXPORT_S = 10, 0.05, 2.5
_STAMPS = re.compile(rb"asked=(\d+) told=(\d+) ")
# Where each stage ends; the words of the first are the caller's own.
ENDS: tuple[tuple[str, str], ...] = (
    ("client.chat", "the sidecar has read the request"),
    ("gateway.run_job", "sealed, sent to the gateway, key and limits checked"),
    ("matcher.request_job", "the matcher has it"),
    ("provider.run_job", "decided, dispatched, accepted, opened by the key holder"),
    ("asked", "the engine is asked"),
    ("told", "the engine's first word (its own time)"),
    ("first", "sealed, relayed after the commit, opened, shown to the caller"),
)
Times = Mapping[str, int]  # nanoseconds since 1970, by the name of what happened

STAGES = Question(
    "stages",
    "Where the time to the first token goes, through the sidecar, one stream at a time, traced",
    (
        Column("us", "p50, us"), Column("p90_us", "p90, us"), Column("until_us", "until, us"),
    ),
    lambda rows: [],
)  # fmt: skip


def stage_rows(requests: Sequence[Times]) -> Rows:
    """Median and 90th percentile of each stage, and until its end, over whole requests."""
    whole = [times for times in requests if all(name in times for name, _ in ENDS)]
    rows: Rows = {}
    before = "sent"
    for name, told in ENDS:
        if not whole:
            break
        took = sorted((times[name] - times[before]) / 1000 for times in whole)
        rows[told] = {
            "us": statistics.median(took),
            "p90_us": took[min(len(took) - 1, len(took) * 9 // 10)],
            "until_us": statistics.median((t[name] - t["sent"]) / 1000 for t in whole),
        }
        before = name
    return rows


def began(bodies: Sequence[bytes]) -> dict[str, dict[str, int]]:
    """trace -> span's name -> when it began first, from what a collector was sent."""
    found: dict[str, dict[str, int]] = {}
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    times = found.setdefault(span.trace_id.hex(), {})
                    at = span.start_time_unix_nano
                    times[span.name] = min(at, times.get(span.name, at))
    return found


async def _ask(url: str, count: int) -> dict[str, dict[str, int]]:
    """trace -> what the caller and the engine saw of it."""
    address = urlsplit(url)
    body = Spec(url, "any", stream=True).body()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    seen: dict[str, dict[str, int]] = {}
    for _ in range(count):
        await asyncio.sleep(PAUSE_S)
        trace = secrets.token_hex(16)
        head = (
            f"POST {address.path}/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\n"
            f"traceparent: 00-{trace}-{secrets.token_hex(8)}-01\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        times = {"sent": time.time_ns()}
        writer.write(head.encode() + body)
        got = b""
        async with asyncio.timeout(TIMEOUT_S):
            while not got.endswith(b"\r\n0\r\n\r\n"):
                part = await reader.read(65536)
                if not part:
                    raise RuntimeError(f"the sidecar broke off: {got[:200]!r}")
                got += part
                if "first" not in times and WORD in got:
                    times["first"] = time.time_ns()
        stamps = _STAMPS.search(got)
        if stamps is None:
            raise RuntimeError(f"no stamps came back: {got[:200]!r}")
        times |= {"asked": int(stamps[1]), "told": int(stamps[2])}
        seen[trace] = times
    writer.close()
    return seen


def stages(folder: Path, *, requests: int) -> Finding:
    with ExitStack() as stack:
        collector = stack.enter_context(collecting())
        port = free_port()
        stack.enter_context(
            process([sys.executable, "-m", "benchmarks.zero_work_engine", str(port), "stamps"])
        )
        wait_for(port)
        ready, _, _ = start_network(
            stack, folder / "network-traced", f"http://127.0.0.1:{port}/v1",
            options=("--otlp", collector.url),
        )  # fmt: skip
        seen = asyncio.run(_ask(ready["sidecar"], WARM_UP + requests))
        time.sleep(EXPORT_S)
        spans = began(collector.bodies)
    joined = [{**times, **spans.get(trace, {})} for trace, times in list(seen.items())[WARM_UP:]]
    return Finding(stage_rows(joined))
