"""`python -m tests.mutation [PATTERN ...]`: the mutants of domain, sealing and evidence.

mutmut makes them, by its settings in pyproject.toml, into `.mutation/`; trial.py tries them. No
product file is ever changed. What was found is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from mutmut.__main__ import create_mutants
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.utils.file_utils import (
    change_cwd,
    copy_also_copy_files,
    copy_src_dir,
    setup_source_paths,
    walk_mutatable_files,
)

from tests.mutation.results import chosen, markdown, results
from tests.mutation.trial import Trial

ROOT = Path(__file__).parents[2]
# mutmut knows no import root but `.` and `src`.
LINKS = {
    "src": "libs", "services": "services", "models": "models", "docs": "docs", "tests": "tests",
    "pyproject.toml": "pyproject.toml",
}  # fmt: skip
# The same examples each time; and what fails need not be made small.
hypothesis_settings.register_profile(
    "mutants", derandomize=True, database=None, deadline=None,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
ALL = {"killed", "timeout", "survived", "untried"}


def prepare(work: Path, only: list[str]) -> None:
    """Make the mutants of what changed; the others keep what was found."""
    work.mkdir(exist_ok=True)
    for name, target in LINKS.items():
        if not (work / name).is_symlink():
            (work / name).symlink_to(ROOT / target)
    with change_cwd(work), open(os.devnull, "w") as silence, redirect_stdout(silence):
        if only:
            config().only_mutate = [
                f"src/{pattern.removesuffix('.*').replace('.', '/')}.py" for pattern in only
            ]
        copy_src_dir()
        copy_also_copy_files()
        setup_source_paths()
        create_mutants(1)


def run(work: Path, names: list[str], tests: list[str], seconds: float) -> int:
    """Try these mutants, and keep each result when it is there."""
    with change_cwd(work):
        files = [SourceFileMutationData(path=path) for path in walk_mutatable_files()]
        for file in files:
            file.load()
    file_of = {name: file for file in files for name in file.exit_code_by_key}

    def keep(name: str, code: int) -> None:
        file_of[name].exit_code_by_key[name] = code
        with change_cwd(work):
            file_of[name].save()

    settings = config()
    arguments = [
        "--rootdir=.", "-q", "-s", "--hypothesis-profile=mutants",
        "--tb=native", "--assert=plain",  # explaining a failure takes longer than finding it
        *settings.pytest_add_cli_args,
        *(tests or settings.pytest_add_cli_args_test_selection),
    ]  # fmt: skip
    with change_cwd(work / "mutants"):
        return int(pytest.main(arguments, plugins=[Trial(names, keep, seconds=seconds)]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("pattern", nargs="*", help="only these, as cocoon.sealing.hpke.*")
    parser.add_argument("--again", action="store_true", help="try those that survived, too")
    parser.add_argument("--anew", action="store_true", help="forget what was found")
    parser.add_argument("--list", action="store_true", help="try nothing, only print")
    parser.add_argument("--seconds", type=float, default=1.0, help="of tests that a mutant meets")
    parser.add_argument("--tests", action="append", default=[], help="other tests than usual")
    parser.add_argument("--small", type=Path, help="in this new folder, of these modules alone")
    asked = parser.parse_args()
    if not asked.small:
        os.nice(15)
    work, failed = asked.small or ROOT / ".mutation", 0
    if not asked.list:
        prepare(work, asked.pattern if asked.small else [])
        wanted = ALL if asked.anew else {"untried", "survived"} if asked.again else {"untried"}
        names = chosen(results(work), asked.pattern, wanted)
        failed = run(work, names, asked.tests, asked.seconds) if names else 0
    found = results(work)
    print(markdown(found))
    print(*chosen(found, asked.pattern, {"survived"}), sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
