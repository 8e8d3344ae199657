"""`python -m tests.mutation` still finds what tests notice and what they do not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_small_module_s_mutants_are_made_and_tried(tmp_path: Path) -> None:
    """test_decide.py knows accounts from afar: it notices most mutants of them, and not all."""
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.mutation", "cocoon.domain.account.*",
            "--small", str(tmp_path / "work"), "--tests", "tests/unit/test_decide.py",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = re.search(r"\| domain\.account \| (\d+) \| (\d+) \| 0 \| (\d+) \|", done.stdout)
    assert row is not None, done.stdout
    mutants, killed, survived = map(int, row.groups())
    assert mutants == killed + survived
    assert killed > mutants / 2
    assert survived > 0
    assert done.stdout.count("cocoon.domain.account.x_") == survived
    assert "not tried yet" not in done.stdout
