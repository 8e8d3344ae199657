"""`python -m tests.mutation [PATTERN ...]`: the mutants of domain, sealing and evidence.

mutmut makes the mutants and forks a loaded pytest for each; its settings are in pyproject.toml.
It wants its module names from a folder `src`, so it runs in `.mutation/`, which is links and what
it keeps. No product file is ever changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.mutation.results import WORK, markdown, results, survivors

LINKS = {
    "src": "libs", "services": "services", "models": "models", "docs": "docs", "tests": "tests",
    "pyproject.toml": "pyproject.toml",
}  # fmt: skip


def prepare() -> None:
    WORK.mkdir(exist_ok=True)
    for name, target in LINKS.items():
        if not (WORK / name).is_symlink():
            (WORK / name).symlink_to(f"../{target}")


def run(names: list[str]) -> int:
    """One core, politely. CI makes Hypothesis draw the same examples each time, no deadlines."""
    program = os.path.join(os.path.dirname(sys.executable), "mutmut")
    command = ["nice", "-n", "15", program, "run", "--max-children", "1", *names]
    return subprocess.run(command, cwd=WORK, env={**os.environ, "CI": "1"}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "pattern", nargs="*", help="mutants to try again, as cocoon.sealing.hpke.*; else go on"
    )
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("--list", action="store_true", help="only print what was found before")
    asked = parser.parse_args()
    prepare()
    names = asked.pattern
    if asked.again:
        (WORK / "mutants/mutmut-stats.json").unlink(missing_ok=True)  # tests reach other functions
        names = survivors(asked.pattern)
    failed = 0 if asked.list or (asked.again and not names) else run(names)
    print(markdown(results()))
    print(*survivors(asked.pattern), sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
