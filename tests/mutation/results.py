"""What mutmut found, read from the files that it keeps: a count for each module, and survivors."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from pathlib import Path

WORK = Path(__file__).parents[2] / ".mutation"
# mutmut's exit codes: 1 and 3 are a test that failed, the signals and 36 a run that never ended
_KILLED = (1, 3)
_TIMEOUT = (24, 36, 152, 255, -24)


def results() -> dict[str, dict[str, int | None]]:
    """Module -> mutant -> exit code; None where it was not tried yet."""
    found = {}
    for path in sorted((WORK / "mutants/src/cocoon").rglob("*.py.meta")):
        mutants = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if mutants:
            module = path.relative_to(WORK / "mutants/src").as_posix().removesuffix(".py.meta")
            found[module.replace("/", ".")] = mutants
    return found


def outcome(code: int | None) -> str:
    if code is None:
        return "untried"
    return "killed" if code in _KILLED else "timeout" if code in _TIMEOUT else "survived"


def matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def survivors(patterns: list[str]) -> list[str]:
    """Mutants that no test noticed, of all or of those that match one of the patterns."""
    return [
        name
        for mutants in results().values()
        for name, code in mutants.items()
        if outcome(code) == "survived" and matches(name, patterns)
    ]


def markdown(found: dict[str, dict[str, int | None]]) -> str:
    """The table of docs/mutation.md: a line for each module, then one for each package."""
    counts: dict[str, Counter[str]] = {}
    for module, mutants in found.items():
        counts[module] = Counter(outcome(code) for code in mutants.values())
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
