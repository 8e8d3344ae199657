"""The `cocoon` command, one file per noun. It prints for people; `--json` prints for programs."""

from cocoon.cli.app import main

__all__ = ["main"]
