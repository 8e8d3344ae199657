"""What the path adds: first token, jobs a second, CPU a job, chunks a second, arm by arm.

All arms stand before the same zero-work engine and are measured in turn, round after round; a
figure is the median of its rounds. A job that an arm refuses or cuts short fails that arm's run,
which is said.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.arms import (
    ENGINE,
    LITELLM,
    LITELLM_TWO,
    PORTKEY,
    SDK,
    SIDECAR,
    Arms,
    Run,
)
from benchmarks.report import Aim, Column, Finding, Question, Row, Rows, middle, percentile, ratio

AT_ONCE = 64
CORES = os.cpu_count() or 1
ALL = (ENGINE, LITELLM, LITELLM_TWO, PORTKEY, SIDECAR, SDK)
PARTS = (
    "sidecar", "client", "gateway", "matcher", "provider", "key holder", "billing", "attestation",
    "nats", "postgres",
)  # fmt: skip


@dataclass
class Rounds:
    """Figures of each arm, a row a round, and which runs failed."""

    arms: Arms
    names: Sequence[str]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def measure(self, rounds: int, one: Callable[[str], Row]) -> None:
        """`one(name)` for each arm in turn, so many times."""
        for turn in range(rounds):
            for arm in self.arms.has(*self.names):
                print(f"  round {turn + 1}: {arm.name}", file=sys.stderr)
                try:
                    self.rows.setdefault(arm.name, []).append(one(arm.name))
                except RuntimeError as error:
                    self.failed.append(f"{arm.name}, round {turn + 1}: {error}")

    def finding(self, *notes: str) -> Finding:
        rows = {name: middle(found) for name, found in self.rows.items() if found}
        return Finding(rows, [*notes, *self.failed])


# ---- first token ----

FIRST_TOKEN = Question(
    "first_token",
    "First token of a stream: one at a time (50 ms apart), and at half the arm's own highest rate",
    (
        Column("one_ms", "p50, ms", 2), Column("one_p99_ms", "p99, ms", 2),
        Column("added_ms", "added p50, ms", 2), Column("added_p99_ms", "added p99, ms", 2),
        Column("streams_per_s", "streams/s, 64 at once"), Column("pace_per_s", "half load, /s"),
        Column("half_ms", "half: added p50, ms", 2),
        Column("half_p99_ms", "half: added p99, ms", 2),
    ),
    lambda rows: [
        Aim("added p50 of LiteLLM's, SDK", "at most", 0.20,
            ratio(rows, SDK, LITELLM, "added_ms")),
        Aim("added p50 of LiteLLM's, sidecar", "at most", 0.20,
            ratio(rows, SIDECAR, LITELLM, "added_ms")),
        Aim("added p50 of LiteLLM's at half load, SDK", "at most", 0.20,
            ratio(rows, SDK, LITELLM, "half_ms")),
        Aim("added p50 of LiteLLM's at half load, sidecar", "at most", 0.20,
            ratio(rows, SIDECAR, LITELLM, "half_ms")),
        *(
            Aim(f"added p99 of its p50 at half load, {label}", "at most", 3.0,
                _own(rows, name, "half_p99_ms", "half_ms"))
            for name, label in ((SDK, "SDK"), (SIDECAR, "sidecar"))
        ),
    ],
)  # fmt: skip


def _own(rows: Rows, name: str, over: str, under: str) -> float | None:
    row = rows.get(name, {})
    return row[over] / row[under] if over in row and row.get(under, 0) > 0 else None


def first_token(arms: Arms, *, rounds: int, requests: int, seconds: float) -> Finding:
    """One at a time, then the highest rate, then paced at half of it."""
    alone = Rounds(arms, ALL)
    times: dict[str, list[float]] = {}

    def one(name: str) -> Row:
        found = arms.run(name, mode="one", count=requests, stream=True).first_ms
        times.setdefault(name, []).extend(found)
        return {"one_ms": statistics.median(found)}

    alone.measure(rounds, one)
    highest = Rounds(arms, ALL)
    highest.measure(
        max(1, rounds - 1), lambda name: {"streams_per_s": _highest(arms, name, seconds).rate}
    )
    rates = {name: row["streams_per_s"] for name, row in highest.finding().rows.items()}
    paces = {name: rate / 2 for name, rate in rates.items()}
    slower = [pace for name, pace in paces.items() if name != ENGINE]
    if slower and ENGINE in paces:  # what the engine itself takes at the arms' paces
        paces[ENGINE] = min(paces[ENGINE], max(slower))
    half = Rounds(arms, tuple(paces))
    late: dict[str, list[float]] = {}

    def paced(name: str) -> Row:
        load_s = max(seconds, 20 / paces[name])  # a slow arm needs time for a percentile
        found = arms.run(
            name, mode="paced", rate=paces[name], seconds=min(load_s, 3 * seconds), stream=True
        ).first_ms
        late.setdefault(name, []).extend(found)
        return {"paced_ms": statistics.median(found)}

    half.measure(rounds, paced)
    finding = alone.finding(*highest.failed, *half.failed)
    _add(finding.rows, times, rates, paces, late)
    return finding


def _highest(arms: Arms, name: str, seconds: float) -> Run:
    return arms.run(name, mode="closed", at_once=AT_ONCE, seconds=seconds, stream=True)


def _add(
    rows: Rows, times: dict[str, list[float]], rates: Row, paces: Row,
    late: dict[str, list[float]],
) -> None:  # fmt: skip
    """What is computed over all rounds: percentiles, and what an arm adds to the engine's p50."""
    engine_ms = rows.get(ENGINE, {}).get("one_ms", 0.0)
    engine_late_ms = statistics.median(late[ENGINE]) if late.get(ENGINE) else 0.0
    for name, row in rows.items():
        row["one_p99_ms"] = percentile(times[name], 99)
        if name in rates:
            row["streams_per_s"], row["pace_per_s"] = rates[name], paces[name]
        if name == ENGINE:
            continue
        row["added_ms"] = row["one_ms"] - engine_ms
        row["added_p99_ms"] = row["one_p99_ms"] - engine_ms
        if late.get(name):
            row["half_ms"] = statistics.median(late[name]) - engine_late_ms
            row["half_p99_ms"] = percentile(late[name], 99) - engine_late_ms


# ---- jobs a second, CPU a job ----

JOBS = Question(
    "jobs",
    "Whole answers, 64 at once; CPU a job is the arm's own, the SDK's client included",
    (
        Column("jobs_per_s", "jobs/s"), Column("cpu_us", "CPU a job, us"),
        Column("p50_ms", "p50, ms", 1), Column("p99_ms", "p99, ms", 1),
        Column("caller_us", "caller, us"), Column("engine_us", "engine, us"),
        Column("caller_share", "caller's share of the machine, %"),
        Column("others_share", "others' share, %"),
    ),
    lambda rows: [
        *(
            Aim(f"jobs/s of LiteLLM's, {label}", "at least", 20,
                ratio(rows, name, LITELLM, "jobs_per_s"))
            for name, label in ((SDK, "SDK"), (SIDECAR, "sidecar"))
        ),
        *(
            Aim(f"CPU a job of LiteLLM's, {label}", "at most", 1 / 12,
                ratio(rows, name, LITELLM, "cpu_us"))
            for name, label in ((SDK, "SDK"), (SIDECAR, "sidecar"))
        ),
    ],
)  # fmt: skip
CPU = Question(
    "cpu",
    "CPU a job of each process, 64 whole answers at once, us",
    tuple(Column(part, part) for part in PARTS),
    lambda rows: [],
)


def jobs(arms: Arms, *, rounds: int, seconds: float) -> tuple[Finding, Finding]:
    """(JOBS, CPU): throughput of whole answers, and who spent the CPU."""
    measured, parts = Rounds(arms, ALL), Rounds(arms, ())

    def one(name: str) -> Row:
        run = arms.run(name, mode="closed", at_once=AT_ONCE, seconds=seconds)
        if name in (SIDECAR, SDK):
            parts.rows.setdefault(name, []).append(_parts(run))
        return load_row(run)

    measured.measure(rounds, one)
    split = parts.finding()
    split.rows.update(client_shares(split.rows, measured.finding().rows))
    return measured.finding(), split


def _parts(run: Run) -> Row:
    return {name: used / run.done * 1e6 for name, used in run.cpu_s.items() if name in PARTS}


def client_shares(parts: Rows, loads: Rows) -> Rows:
    """The client's part alone: the sidecar's process, and the SDK's less a plain caller's cost."""
    plain_us = loads.get(SIDECAR, {}).get("caller_us", 0.0)
    shares: Rows = {}
    if "sidecar" in parts.get(SIDECAR, {}):
        shares["the sidecar's share"] = {"sidecar": parts[SIDECAR]["sidecar"]}
    if "client" in parts.get(SDK, {}):
        shares["the SDK's share (less a plain caller)"] = {
            "client": parts[SDK]["client"] - plain_us
        }
    return shares


def load_row(run: Run) -> Row:
    """Throughput, CPU, and how much of the machine the caller and strangers took."""
    return {
        "jobs_per_s": run.rate,
        "cpu_us": run.arm_cpu_s / run.done * 1e6,
        "p50_ms": statistics.median(run.whole_ms),
        "p99_ms": percentile(run.whole_ms, 99),
        "caller_us": run.caller_cpu_s / run.done * 1e6,
        "engine_us": run.engine_cpu_s / run.done * 1e6,
        "caller_share": run.caller_cpu_s / run.seconds / CORES * 100,
        "others_share": run.others_cpu_s / run.seconds / CORES * 100,
    }
