"""The provider's guide names commands and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from cocoon.cli.app import app

GUIDE = Path(__file__).parents[2] / "docs" / "provider-guide.md"
_VERBS: dict[str, set[str]] = {
    name: {option for one in command.params for option in one.opts}
    for name, command in typer.main.get_command(app).commands["provider"].commands.items()  # type: ignore[attr-defined]
}


def test_every_verb_is_in_the_table_with_options_that_it_takes() -> None:
    rows = re.findall(r"^\| (`.+?) \| ", GUIDE.read_text(), re.MULTILINE)
    told: dict[str, set[str]] = {}
    for row in rows:
        for call in re.findall(r"`([^`]+)`", row):
            told[call.split()[0]] = set(re.findall(r"--[a-z]+", call))
    assert told.keys() == _VERBS.keys()
    for verb, options in told.items():
        assert options <= _VERBS[verb], verb


@pytest.mark.parametrize("line", re.findall(r"\./cocoon provider [^\n`]+", GUIDE.read_text()))
def test_every_command_that_is_shown_is_one(line: str) -> None:
    verb, *arguments = shlex.split(line.split("#", maxsplit=1)[0].rstrip(",."))[2:]
    assert verb in _VERBS
    assert {one for one in arguments if one.startswith("--")} <= _VERBS[verb]
