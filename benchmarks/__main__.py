"""`benchmarks/run`: every figure of the README in one run, beside what was aimed at.

    benchmarks/run [--quick] [--only NAME ...] [--json FILE] [--markdown] [--from FILE]

All arms of a question are measured in turn, in rounds, in this one run: only figures of one run
are comparable. --quick takes less than ten minutes on two quiet cores and leaves out the log of
ten million events. LiteLLM and Portkey are installed at first use.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import append, chunks, durability, log_size, parts, path, providers, relay, stages
from benchmarks.arms import Arms
from benchmarks.processes import ROOT
from benchmarks.report import Finding, Question, written

FOLDER = ROOT / ".cocoon-bench"
ON_PATH = (path.FIRST_TOKEN, path.JOBS, path.CPU, chunks.CHUNKS)
QUESTIONS: tuple[Question, ...] = (
    *ON_PATH, parts.PARTS, stages.STAGES, durability.DURABILITY, append.APPEND, relay.RELAYED,
    providers.PROVIDERS, log_size.LOG_SIZE,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is measured. `seconds`: of a load. `scale_`: of the two scaling questions."""

    rounds: int
    seconds: float
    requests: int  # one at a time, a round
    jobs: int  # an append or relay round
    providers: tuple[int, ...]
    lengths: tuple[int, ...]
    scale_rounds: int
    scale_jobs: int


QUICK = Size(2, 3.0, 25, 1500, (1, 3, 1000), (10_000, 1_000_000), 1, 1000)
WHOLE = Size(
    5, 6.0, 60, 4000, (1, 3, 100, 1000), (10_000, 1_000_000, 10_000_000), 3, 2000
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _arguments().parse_args(arguments)
    if chosen.read:
        stored = json.loads(chosen.read.read_text(encoding="utf-8"))
        findings = {name: Finding(**one) for name, one in stored["findings"].items()}
        print(written(QUESTIONS, findings, as_markdown=chosen.markdown))
        print(f"\n{stored['machine']}")
        return
    logging.getLogger("cocoon").setLevel(logging.ERROR)  # connections that end are no news here
    began_s = time.monotonic()
    names = chosen.only or [question.name for question in QUESTIONS]
    findings = measure(set(names), QUICK if chosen.quick else WHOLE, chosen.folder)
    print(written(QUESTIONS, findings, as_markdown=chosen.markdown))
    print(f"\n{_machine()}; measured in {time.monotonic() - began_s:.0f} s")
    if chosen.json:
        value = {
            "machine": _machine(), "quick": chosen.quick,
            "findings": {name: asdict(one) for name, one in findings.items()},
        }  # fmt: skip
        chosen.json.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="within ten minutes")
    parser.add_argument(
        "--only", action="append", choices=[q.name for q in QUESTIONS], metavar="NAME",
        help="one question (may be repeated): " + ", ".join(q.name for q in QUESTIONS),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into FILE")
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


def measure(wanted: set[str], size: Size, folder: Path) -> dict[str, Finding]:
    """Findings by question. A question that breaks says so and the others go on."""
    findings = _with_arms(wanted, size, folder)
    alone: tuple[tuple[Question, Callable[[], Finding]], ...] = (
        (parts.PARTS, lambda: parts.parts(count=size.jobs // 4)),
        (stages.STAGES, lambda: stages.stages(folder, requests=2 * size.requests)),
        (append.APPEND, lambda: append.append(rounds=size.rounds, jobs=size.jobs)),
        (relay.RELAYED, lambda: relay.relay(rounds=size.rounds, jobs=size.jobs)),
        (
            providers.PROVIDERS,
            lambda: providers.providers(
                counts=size.providers, rounds=size.scale_rounds, jobs=size.scale_jobs
            ),
        ),
        (
            log_size.LOG_SIZE,
            lambda: log_size.log_size(
                lengths=size.lengths, rounds=size.scale_rounds + 1, jobs=size.scale_jobs
            ),
        ),
    )
    for question, ask in alone:
        if question.name in wanted:
            findings |= _asked(question, ask)
    return findings


def _with_arms(wanted: set[str], size: Size, folder: Path) -> dict[str, Finding]:
    """What is measured through HTTP, with every arm running."""
    on_path = wanted & {question.name for question in ON_PATH}
    durable = durability.DURABILITY.name in wanted
    found: dict[str, Finding] = {}
    if not on_path and not durable:
        return found
    with ExitStack() as stack:
        _say("starting the arms")
        arms = Arms(stack, folder)
        arms.start_network()
        if on_path:
            arms.start_proxies()
            found |= _on_path(arms, on_path, size)
            next(iter(found.values())).notes.extend(arms.left_out)
        if durable:
            arms.start_network(volatile=True)
            found |= _asked(
                durability.DURABILITY,
                lambda: durability.durability(
                    arms, rounds=size.rounds, requests=size.requests, seconds=size.seconds
                ),
            )
    return found


def _on_path(arms: Arms, wanted: set[str], size: Size) -> dict[str, Finding]:
    found: dict[str, Finding] = {}
    if path.FIRST_TOKEN.name in wanted:
        found |= _asked(
            path.FIRST_TOKEN,
            lambda: path.first_token(
                arms, rounds=size.rounds, requests=size.requests, seconds=size.seconds
            ),
        )
    if {path.JOBS.name, path.CPU.name} & wanted:
        both = (path.JOBS, path.CPU)
        found |= _answers(both, lambda: path.jobs(arms, rounds=size.rounds, seconds=size.seconds))
    if chunks.CHUNKS.name in wanted:
        found |= _asked(
            chunks.CHUNKS, lambda: chunks.chunks(arms, rounds=size.rounds, seconds=size.seconds)
        )
    return found


def _asked(question: Question, ask: Callable[[], Finding]) -> dict[str, Finding]:
    return _answers((question,), lambda: (ask(),))


def _answers(
    questions: Sequence[Question], ask: Callable[[], Sequence[Finding]]
) -> dict[str, Finding]:
    _say(f"measuring: {questions[0].title}")
    try:
        return {one.name: found for one, found in zip(questions, ask(), strict=True)}
    except Exception as error:  # noqa: BLE001 - the other questions are measured all the same
        why = f"not measured: {type(error).__name__}: {error}"
        return {one.name: Finding({}, [why]) for one in questions}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
