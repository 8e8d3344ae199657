"""`benchmarks/run`: every figure of the README in one run, beside what was aimed at.

    benchmarks/run [--quick] [--only NAME ...] [--json FILE] [--markdown] [--from FILE]

All arms of a question are measured in turn, in rounds, in this one run: only figures of one run
are comparable. --quick takes less than ten minutes on two cores and skips the log of ten million
events. LiteLLM and Portkey are installed at first use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import chunks, durability, path
from benchmarks.arms import Arms
from benchmarks.processes import ROOT
from benchmarks.report import Finding, Question, written

FOLDER = ROOT / ".cocoon-bench"
QUESTIONS: tuple[Question, ...] = (
    path.FIRST_TOKEN, path.JOBS, path.CPU, chunks.CHUNKS, durability.DURABILITY,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How long a run takes: rounds, seconds a load, single requests a round."""

    rounds: int
    seconds: float
    requests: int


QUICK, WHOLE = Size(2, 3.0, 30), Size(5, 6.0, 60)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _arguments().parse_args(arguments)
    if chosen.read:
        stored = json.loads(chosen.read.read_text())
        findings = {name: Finding(**one) for name, one in stored["findings"].items()}
        print(written(QUESTIONS, findings, as_markdown=chosen.markdown))
        return
    began_s = time.monotonic()
    names = chosen.only or [question.name for question in QUESTIONS]
    size = QUICK if chosen.quick else WHOLE
    findings = measure(names, size, chosen.folder, quick=chosen.quick)
    print(written(QUESTIONS, findings, as_markdown=chosen.markdown))
    print(f"\n{_machine()}; measured in {time.monotonic() - began_s:.0f} s")
    if chosen.json:
        value = {
            "machine": _machine(), "quick": chosen.quick,
            "findings": {name: asdict(one) for name, one in findings.items()},
        }  # fmt: skip
        chosen.json.write_text(json.dumps(value, indent=1))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="within ten minutes")
    parser.add_argument(
        "--only", action="append", choices=[q.name for q in QUESTIONS], metavar="NAME",
        help="one question (may be repeated): " + ", ".join(q.name for q in QUESTIONS),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--from", dest="read", type=Path, metavar="FILE",
        help="print the report of figures that --json wrote, and measure nothing",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the other proxies are installed"
    )
    return parser


def _machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}"


def measure(names: Sequence[str], size: Size, folder: Path, *, quick: bool) -> dict[str, Finding]:
    """Findings by question. A question that breaks says so and the others go on."""
    findings: dict[str, Finding] = {}
    on_path = {q.name for q in (path.FIRST_TOKEN, path.JOBS, path.CPU, chunks.CHUNKS)}
    wanted = set(names)
    if wanted & (on_path | {durability.DURABILITY.name}):
        with ExitStack() as stack:
            _say("starting the arms")
            arms = Arms(stack, folder)
            arms.start_network()
            if wanted & on_path:
                arms.start_proxies()
            findings |= _on_path(arms, wanted, size)
            if durability.DURABILITY.name in wanted:
                arms.start_network(volatile=True)
                findings |= _asked(durability.DURABILITY, lambda: durability.durability(
                    arms, rounds=size.rounds, requests=size.requests, seconds=size.seconds
                ))  # fmt: skip
            for finding in findings.values():
                finding.notes += arms.left_out
                break
    return findings


def _on_path(arms: Arms, wanted: set[str], size: Size) -> dict[str, Finding]:
    found: dict[str, Finding] = {}
    if path.FIRST_TOKEN.name in wanted:
        found |= _asked(path.FIRST_TOKEN, lambda: path.first_token(
            arms, rounds=size.rounds, requests=size.requests, seconds=size.seconds
        ))  # fmt: skip
    if {path.JOBS.name, path.CPU.name} & wanted:
        _say(path.JOBS.title)
        jobs, cpu = path.jobs(arms, rounds=size.rounds, seconds=size.seconds)
        found |= {path.JOBS.name: jobs, path.CPU.name: cpu}
    if chunks.CHUNKS.name in wanted:
        found |= _asked(chunks.CHUNKS, lambda: chunks.chunks(
            arms, rounds=size.rounds, seconds=size.seconds
        ))  # fmt: skip
    return found


def _asked(question: Question, ask: Callable[[], Any]) -> dict[str, Finding]:
    _say(question.title)
    try:
        return {question.name: ask()}
    except Exception as error:  # noqa: BLE001 - the other questions are measured all the same
        return {question.name: Finding({}, [f"not measured: {type(error).__name__}: {error}"])}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
