"""`cocoon replay`: fold the log again and compare with the live tables."""

from __future__ import annotations

import os
import subprocess
import sys

import typer

from cocoon.cli.session import Data, folder_of


def replay(context: typer.Context, data: Data = None) -> None:
    """Fold the log again and compare it with what is live: 0 equal, 1 different, 2 log corrupt.

    Options: --verify, --decisions, --from N, --to M, --shards 0,1, --json.
    """
    folder = folder_of(data)
    folder.read_running()
    done = subprocess.run(
        [sys.executable, "-m", "services.billing.replay", *context.args],
        env={**os.environ, "COCOON_REPLAY_POSTGRES_DSN_FILE": str(folder.dsn("reader"))},
        check=False,
    )
    raise typer.Exit(done.returncode)
