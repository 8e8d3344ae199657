"""Fuzz the parsers with atheris: python -m tests.fuzz NAME ... [--runs N] [--keep FOLDER].

Each target runs in a child of its own, from its committed seeds, and stops at its first finding,
which is written to FOLDER (default: a new one that is named) with the inputs that were new.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import atheris

with (
    contextlib.redirect_stderr(io.StringIO()),  # a line for each module
    atheris.instrument_imports(include=["cocoon", "services"]),
):
    from tests.fuzz.targets import CORPUS, JSON_TARGETS, MAX_INPUT_BYTES, TARGETS
from tests.fuzz.json_mutator import mutator

SLOWEST_INPUT_S = 20
MEMORY_MB = 1024


def fuzz(name: str, runs: int, seed: int, folder: Path) -> bool:
    """Run one target in a child; whether it ended without a finding. Writes FOLDER/NAME.log."""
    new_inputs = folder / name
    new_inputs.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = (
        f"-runs={runs}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", "-len_control=20",
        f"-timeout={SLOWEST_INPUT_S}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={new_inputs}{os.sep}finding-",
    )  # fmt: skip
    arguments = [sys.argv[0], *options, str(new_inputs), str(CORPUS / name)]
    if name in JSON_TARGETS:
        mutate = mutator(_mutated_bytes, JSON_TARGETS[name])
        atheris.Setup(arguments, TARGETS[name], custom_mutator=mutate)
    else:
        atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()  # ends the process
    return False


def _mutated_bytes(data: bytes, max_size: int) -> bytes:
    mutated: bytes = atheris.Mutate(data, max_size)  # another function once Fuzz() runs
    return mutated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them where none is given")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="the folder for findings, new inputs and logs")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - TARGETS.keys())
    if unknown:
        parser.error(f"no target is named {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="cocoon-fuzz-"))
    failed = []
    for name in asked.names or TARGETS:
        good = fuzz(name, asked.runs, asked.seed, folder)
        print(
            f"{name}: {'no finding' if good else f'A FINDING, see {folder / name}.log'}", flush=True
        )
        failed += [] if good else [name]
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
