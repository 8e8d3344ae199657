"""`cocoon test`: the tests, with whatever arguments pytest takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from cocoon.kernel.errors import ConfigurationError


def test(context: typer.Context) -> None:
    """Run the tests; arguments go on to pytest. The end says how many ran and what was skipped."""
    root = Path(os.environ.get("COCOON_ROOT", "."))
    if not (root / "tests").is_dir():
        raise ConfigurationError("there are no tests here; run this from a checkout of Cocoon")
    os.chdir(root)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *context.args])  # noqa: S606
