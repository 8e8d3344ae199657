"""`cocoon replay`: fold the log again and compare with the live tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from cocoon.cli.session import Data, Json, folder_of


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
            help="The first position that matters: the fold begins at the newest snapshot before "
            "it. Without one only chain and decisions are checked, and no table compared.",
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
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the log into a new file, for an auditor."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Verify such a file instead; no network is needed."),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fold the log again and compare it with what is live.

    Events that billing has put aside (`./cocoon status`) are left out on both sides, and named.
    Exit code 0: equal, or what was checked holds. 1: different, or no network runs. 2: the log is
    corrupt or cannot be read. 64: wrong usage.
    """
    environment = dict(os.environ)
    flags = {"--verify": verify, "--decisions": decisions, "--json": as_json}
    arguments = [name for name, given in flags.items() if given]
    options: dict[str, object] = {"--from": first if first > 1 else None, "--to": last}
    options |= {"--export": export, "--file": file}
    if file is None:
        folder = folder_of(data)
        running = folder.read_running()
        environment["COCOON_REPLAY_POSTGRES_DSN_FILE"] = str(folder.dsn("reader"))
        options["--shards"] = shards or ",".join(map(str, running.shards))
    arguments += [f"{name}={value}" for name, value in options.items() if value is not None]
    done = subprocess.run(
        [sys.executable, "-m", "services.billing.replay", *arguments],
        env=environment,
        check=False,
    )
    raise typer.Exit(done.returncode)
