"""The command's root: the nouns, and errors as one plain sentence."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from cocoon import __version__
from cocoon.cli import (
    balance,
    ban,
    canary,
    connect,
    explain,
    fund,
    keys,
    matching,
    model,
    model_show,
    provider,
    replay,
    sim,
    status,
    test,
    unpark,
    up,
)
from cocoon.kernel.errors import BadRequest, CocoonError

# typer carries a click of its own, whose base of all wrong calls it does not export
_WRONG_CALL: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_WRONG_USAGE = 64

app = typer.Typer(
    help="Cocoon: private AI inference that nobody between you and the enclave can read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("up")(up.up)
app.command("connect")(connect.connect)
app.command("status")(status.status)
app.command("balance")(balance.balance)
app.command("fund", context_settings={"ignore_unknown_options": True})(fund.fund)  # -5 is no option
app.command("explain")(explain.explain)
app.add_typer(canary.app, name="canary")
app.add_typer(matching.app, name="matching")
model.app.command("show")(model_show.show)
app.add_typer(model.app, name="model")
app.add_typer(provider.app, name="provider")
app.command("ban")(ban.ban)
app.command("unpark")(unpark.unpark)
app.add_typer(keys.app, name="keys")
app.command("replay")(replay.replay)
app.command("sim")(sim.sim)
app.command("test", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    test.test
)


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command. A refusal is a sentence on stderr and exit code 1; a wrong call is 64.

    Not click's 2: from `replay` it says that the log is corrupt.
    """
    try:
        code = app(prog_name=_program(), standalone_mode=False)
    except _WRONG_CALL as error:
        error.show()
        sys.exit(_WRONG_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:
        sys.exit(_refused_value(error))
    except CocoonError as error:
        print(f"cocoon: {error.message}", file=sys.stderr)
        sys.exit(_WRONG_USAGE if isinstance(error, BadRequest) else 1)
    sys.exit(code if isinstance(code, int) else 0)


def _refused_value(error: ValueError) -> int:
    """Name the fields that no message may carry. Any other ValueError goes on."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        raise error
    names = ", ".join(".".join(str(part) for part in e["loc"]) for e in error.errors())
    print(f"cocoon: this value cannot be used: {names}", file=sys.stderr)
    return _WRONG_USAGE


def _program() -> str:
    """How it was started: by a checkout's ./cocoon, which says where it is, or installed."""
    return "./cocoon" if "COCOON_ROOT" in os.environ else "cocoon"
