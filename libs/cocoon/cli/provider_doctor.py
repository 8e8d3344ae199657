"""`./cocoon provider doctor`: every requirement with its remedy, a line each, as it is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated

import typer

from cocoon.cli.provider_session import Config, config_path
from cocoon.cli.session import Json
from cocoon.kernel.errors import Unavailable

_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Hash no model and run none: seconds, not minutes.")
    ] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check what a provider needs, say what to do. Exit code 1 if something fails."""
    environment = {
        **os.environ,
        "COCOON_PROVIDER_CONFIG_FILE": str(config_path(config).absolute()),
        "COCOON_DOCTOR_QUICK": "1" if quick else "0",
    }
    found = []
    with subprocess.Popen(
        [sys.executable, "-m", "services.provider.doctor"],
        env=environment, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None  # noqa: S101 - asked for above
        for line in child.stdout:
            one = json.loads(line)
            found.append(one)
            if not as_json:
                print(shown(one, coloured=sys.stdout.isatty()), flush=True)
    if child.returncode not in (0, 1):
        raise Unavailable(f"the doctor itself ended (exit code {child.returncode})")
    if as_json:
        print(json.dumps({"checks": found, "ok": all(one["state"] != "fail" for one in found)}))
    elif not any(one["state"] == "fail" for one in found):
        print("\nnothing fails; `./cocoon provider run` starts the agent")
    raise typer.Exit(child.returncode)


def shown(one: dict[str, str], *, coloured: bool) -> str:
    """A finding for a person: state, what was checked, what was found, and what to do."""
    state = f"{one['state']:4}"
    if coloured:
        state = f"{_COLOURS[one['state']]}{state}\x1b[0m"
    remedy = f"\n       -> {one['remedy']}" if one.get("remedy") else ""
    return f"{state}  {one['check']}: {one['found']}{remedy}"
