"""The tables of docs/faults.md from what the trials noted: `python -m tests.support.fault_table`.

Its arguments are files of JSON lines, as COCOON_FAULT_RESULTS collects them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAMED = re.compile(r"(?P<name>[a-z0-9-]+) (?P<point>.+): kill -9 (?P<victim>self|nats|postgres)")
Trials = list[dict[str, Any]]


def span(trials: Trials, field: str) -> str:
    """The least and the most of a time, in seconds; `-` where none was noted."""
    seen = [trial[field] for trial in trials if trial.get(field) is not None]
    if not seen:
        return "-"
    least, most = f"{min(seen):.1f}", f"{max(seen):.1f}"
    return least if least == most else f"{least} to {most}"


def total(trials: Trials, *fields: str) -> int:
    return sum(trial[field] for trial in trials for field in fields)


def rows(lines: Iterable[str]) -> dict[str, Trials]:
    """The trials by their fault, in the order in which the faults came first."""
    found: dict[str, Trials] = defaultdict(list)
    for line in lines:
        trial = json.loads(line)
        found[trial["fault"]].append(trial)
    return found


def whole(found: dict[str, Trials]) -> str:
    head = ("fault", "times", "violations", "restarted, s", "answered again, s", "drained, s",
            "answers", "not answered", "unpaid")  # fmt: skip
    table = [head, ("---",) * len(head)]
    for fault, trials in found.items():
        if NAMED.fullmatch(fault):
            continue
        spans = (span(trials, name) for name in ("restarted_s", "answered_s", "drained_s"))
        numbers = (total(trials, "ok"), total(trials, "failed", "unknown"), total(trials, "unpaid"))
        times = (len(trials), total(trials, "violations"))
        table.append((fault, *map(str, times), *spans, *map(str, numbers)))
    return _drawn(table)


def named(found: dict[str, Trials]) -> str:
    head = ("process", "killed", "itself, s", "NATS, s", "Postgres, s")
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    seen: Trials = []
    for fault, trials in found.items():
        match = NAMED.fullmatch(fault)
        if match is not None:
            cells[match["name"], match["point"]][match["victim"]] = span(trials, "answered_s")
            seen += trials
    table: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for (name, point), by_victim in cells.items():
        victims = (by_victim.get(victim, "") for victim in ("self", "nats", "postgres"))
        table.append((name, point, *victims))
    sums = (
        f"{len(seen)} kills, {total(seen, 'violations')} violations, {total(seen, 'ok')} answers, "
        f"{total(seen, 'failed', 'unknown')} not answered, {total(seen, 'unpaid')} unpaid"
    )
    return f"{_drawn(table)}\n\n{sums}"


def _drawn(table: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    found = rows(lines)
    told: dict[str, int] = defaultdict(int)
    for trials in found.values():
        for trial in trials:
            for what, count in trial["told"].items():
                told[f"{trial['fault']}: {what}"] += count
    matched = [t["rematched_s"] for ts in found.values() for t in ts if t.get("rematched_s")]
    print(whole(found), named(found), sep="\n\n")
    print(f"\nnext match after the loss was noticed, s: {matched}\n")
    print("\n".join(f"{what}: {count}" for what, count in told.items()))


if __name__ == "__main__":
    main()
