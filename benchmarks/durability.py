"""What durability costs: the network, and the same network where nothing waits for the disk."""

from __future__ import annotations

import statistics

from benchmarks.arms import ENGINE, SIDECAR, VOLATILE, Arms
from benchmarks.path import AT_ONCE, Rounds
from benchmarks.report import Column, Finding, Question, Row

DURABILITY = Question(
    "durability",
    "Durable against volatile (benchmarks/volatile.py), through the sidecar",
    (
        Column("first_ms", "first token p50, ms", 2), Column("jobs_per_s", "jobs/s, 64 at once"),
        Column("cpu_us", "CPU a job, us"), Column("others_share", "others' share, %"),
    ),
    lambda rows: [],
)  # fmt: skip


def durability(arms: Arms, *, rounds: int, requests: int, seconds: float) -> Finding:
    measured = Rounds(arms, (ENGINE, SIDECAR, VOLATILE))

    def one(name: str) -> Row:
        first = arms.run(name, mode="one", count=requests, stream=True).first_ms
        row = {"first_ms": statistics.median(first)}
        if name != ENGINE:
            run = arms.run(name, mode="closed", at_once=AT_ONCE, seconds=seconds)
            row["jobs_per_s"] = run.rate
            row["cpu_us"] = run.arm_cpu_s / run.done * 1e6
        return row

    measured.measure(rounds, one)
    finding = measured.finding()
    rows = finding.rows
    if SIDECAR in rows and VOLATILE in rows:
        cost = {key: rows[SIDECAR][key] - rows[VOLATILE][key] for key in ("first_ms", "cpu_us")}
        rows["durability costs"] = cost
    return finding
