"""`cocoon sim`: the deterministic simulator. It lives with the tests, for it runs the services.

Libraries never import services, so it is started as a program of its own, like the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cocoon.cli.session import Json
from cocoon.kernel.errors import ConfigurationError


def sim(
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The (first) history's seed.")] = 1,
    steps: Annotated[
        int, typer.Option(min=1, metavar="M", help="Steps under faults; then it is drained.")
    ] = 4_000,
    histories: Annotated[
        int, typer.Option(min=1, metavar="K", help="How many seeds, counted up from the first.")
    ] = 1,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="After a violation, go on with the next seed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run simulated histories of the whole network and check the sixteen invariants at each step.

    Exit code 0: they held. 1: one was violated; the seed, the step and the last steps are printed.
    """
    root = Path(os.environ.get("COCOON_ROOT", "."))
    if not (root / "tests" / "sim").is_dir():
        raise ConfigurationError("there is no simulator here; run this from a checkout of Cocoon")
    os.chdir(root)
    arguments = [f"--seed={seed}", f"--steps={steps}", f"--histories={histories}"]
    flags = {"--go-on": go_on, "--json": as_json}
    arguments += [name for name, given in flags.items() if given]
    os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *arguments])  # noqa: S606
