"""`cocoon replay`: fold the log again and compare with the live tables."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated

import typer

from cocoon.cli.session import Data, Json, folder_of

WRONG_USAGE = 64


def replay(
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare with the live tables; it is done in any case."),
    ] = False,
    decisions: Annotated[
        bool,
        typer.Option(
            "--decisions", help="Also make every decision again from its command, and compare."
        ),
    ] = False,
    first: Annotated[
        int,
        typer.Option(
            "--from",
            min=1,
            metavar="N",
            help="The first position to read. From a later one than 1 only the chain is checked, "
            "and no table compared.",
        ),
    ] = 1,
    last: Annotated[
        int | None,
        typer.Option("--to", min=1, metavar="M", help="The last position (default: the end)."),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Which shards, with commas between them (default: all)."),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fold the log again and compare it with what is live.

    Exit code 0: equal. 1: different, or no network runs. 2: the log is corrupt or cannot be read.
    64: wrong usage.
    """
    folder = folder_of(data)
    running = folder.read_running()
    flags = {"--verify": verify, "--decisions": decisions, "--json": as_json}
    arguments = [name for name, given in flags.items() if given]
    wanted = shards or ",".join(map(str, running.shards))
    arguments += [f"--from={first}", f"--shards={wanted}"]
    if last is not None:
        arguments.append(f"--to={last}")
    done = subprocess.run(
        [sys.executable, "-m", "services.billing.replay", *arguments],
        env={**os.environ, "COCOON_REPLAY_POSTGRES_DSN_FILE": str(folder.dsn("reader"))},
        check=False,
    )
    raise typer.Exit(done.returncode)
