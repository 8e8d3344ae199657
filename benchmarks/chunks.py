"""Chunks a second: long streams, 16 at once, the engine's words one by one and back to back.

A chunk is a word of the engine that reached the caller. Cocoon coalesces words that wait, as its
default padding for streams does (P2: up to 8 words or 100 ms); how many events a stream arrived in
says by how much.
"""

from __future__ import annotations

from benchmarks.arms import ENGINE, LITELLM, SDK, SIDECAR, Arms
from benchmarks.path import ALL, CORES, Rounds
from benchmarks.report import Aim, Column, Finding, Question, Row, ratio

AT_ONCE, WORDS = 16, 512

CHUNKS = Question(
    "chunks",
    f"Streams of {WORDS} chunks, {AT_ONCE} at once",
    (
        Column("chunks_per_s", "chunks/s"), Column("chunk_us", "CPU a chunk, us", 1),
        Column("events", "events a stream", 1), Column("per_event", "chunks an event", 1),
        Column("caller_share", "caller's share, %"), Column("others_share", "others' share, %"),
    ),
    lambda rows: [
        Aim(f"chunks/s of LiteLLM's, {label}", "at least", 25,
            ratio(rows, name, LITELLM, "chunks_per_s"))
        for name, label in ((SDK, "SDK"), (SIDECAR, "sidecar"))
    ],
)  # fmt: skip
_OTHER_EVENTS = 4  # beside words: the role, the end, the counts, [DONE]


def chunks(arms: Arms, *, rounds: int, seconds: float) -> Finding:
    measured = Rounds(arms, ALL)

    def one(name: str) -> Row:
        run = arms.run(
            name, mode="closed", at_once=AT_ONCE, seconds=seconds, stream=True, words=WORDS
        )
        events = run.events / run.done
        row = {
            "chunks_per_s": run.words / run.seconds,
            "events": events,
            "per_event": WORDS / max(1.0, events - _OTHER_EVENTS),
            "caller_share": run.caller_cpu_s / run.seconds / CORES * 100,
            "others_share": run.others_cpu_s / run.seconds / CORES * 100,
        }
        if name != ENGINE:
            row["chunk_us"] = run.arm_cpu_s / run.words * 1e6
        return row

    measured.measure(rounds, one)
    return measured.finding()
