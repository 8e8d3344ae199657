"""What is told of a child that does not start: its own sentence, of this start, never raw JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cocoon.devnet.child import Child
from cocoon.kernel.errors import Unavailable


async def told(tmp_path: Path, script: str) -> str:
    child = Child("matcher-2", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    with pytest.raises(Unavailable) as caught:
        await child.start()
    return caught.value.message


async def test_a_sentence_is_told_without_the_log_around_it(tmp_path: Path) -> None:
    script = (
        "import sys; print('{\"event\": 1}\\nmatcher: no luck\\n{}', file=sys.stderr); sys.exit(1)"
    )
    assert await told(tmp_path, script) == (
        f"matcher-2 did not start: no luck (log: {tmp_path / 'log'})"
    )


async def test_without_a_sentence_the_last_lines_of_this_start_are_told(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("matcher: an earlier start\n")
    message = await told(tmp_path, "import sys; print('{\"a\": 1}', file=sys.stderr); sys.exit(3)")
    assert message == (
        f"matcher-2 did not start (exit code 3); its last words are in {tmp_path / 'log'}:\n"
        '  {"a": 1}'
    )
    assert (await told(tmp_path, "pass")).endswith("\n  (nothing)")
