"""What was found, read from the files that mutmut keeps: counts for each module, and survivors."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from pathlib import Path

# mutmut's exit codes: 1 and 3 are a test that failed, the others runs that were ended
_KILLED = (1, 3)
_TIMEOUT = (24, 36, 152, 255, -24)
Found = dict[str, dict[str, int | None]]


def results(work: Path) -> Found:
    """Module -> mutant -> exit code; None where it was not tried yet."""
    found = {}
    for path in sorted((work / "mutants/src/cocoon").rglob("*.py.meta")):
        mutants = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if mutants:
            module = path.relative_to(work / "mutants/src").as_posix().removesuffix(".py.meta")
            found[module.replace("/", ".")] = mutants
    return found


def outcome(code: int | None) -> str:
    if code is None:
        return "untried"
    return "killed" if code in _KILLED else "timeout" if code in _TIMEOUT else "survived"


def chosen(found: Found, patterns: list[str], outcomes: set[str]) -> list[str]:
    """The mutants that match one of the patterns (any, if there is none) and came out so."""
    return [
        name
        for mutants in found.values()
        for name, code in mutants.items()
        if outcome(code) in outcomes
        and (not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    ]


def markdown(found: Found) -> str:
    """The table of docs/mutation.md: a line for each module, then one for each package."""
    counts = {
        module: Counter(outcome(code) for code in mutants.values())
        for module, mutants in found.items()
    }
    packages: dict[str, Counter[str]] = {}
    for module, count in counts.items():
        packages.setdefault(module.rpartition(".")[0], Counter()).update(count)
    lines = [
        "| module | mutants | killed | of these by time | survived | killed % |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(module.removeprefix("cocoon."), count) for module, count in counts.items()),
        *(_line(f"**{package}**", count) for package, count in packages.items()),
    ]
    untried = sum(count["untried"] for count in counts.values())
    return "\n".join(lines) + (f"\n\n{untried} mutants were not tried yet." if untried else "")


def _line(name: str, count: Counter[str]) -> str:
    total = count.total()
    killed = count["killed"] + count["timeout"]
    cells = (total, killed, count["timeout"], count["survived"], f"{100 * killed / total:.1f}")
    return f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |"
