"""The command's root: the nouns, and errors as one plain sentence."""

from __future__ import annotations

import sys
from typing import Any

import typer

from cocoon import __version__
from cocoon.cli import connect, fund, keys, replay, sim, status, test, unpark, up
from cocoon.kernel.errors import CocoonError

# typer carries a click of its own, whose base of all wrong calls it does not export
_WRONG_CALL: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

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
app.command("fund")(fund.fund)
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
    """Run the command. A refusal is a sentence on stderr and exit code 1; a wrong call is 2.

    A wrong call of `replay` is 64: its 2 says that the log is corrupt.
    """
    try:
        code = app(prog_name="cocoon", standalone_mode=False)
    except _WRONG_CALL as error:
        error.show()
        context = getattr(error, "ctx", None)
        of_replay = context is not None and context.info_name == "replay"
        sys.exit(replay.WRONG_USAGE if of_replay else error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:
        sys.exit(_refused_value(error))
    except CocoonError as error:
        print(f"cocoon: {error.message}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _refused_value(error: ValueError) -> int:
    """Name the fields that no message may carry. Any other ValueError goes on."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        raise error
    names = ", ".join(".".join(str(part) for part in e["loc"]) for e in error.errors())
    print(f"cocoon: this value cannot be used: {names}", file=sys.stderr)
    return 2
