"""A wrong call ends with 64 and a sentence; of `replay` it must not look like a corrupt log."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from cocoon.cli.app import main
from services.billing import replay

WRONG = [
    (("replay", "--nope"), "--nope"),
    (("replay", "--from", "0"), "--from"),
    (("replay", "--to", "x"), "--to"),
    (("fund",), "Missing argument"),
    (("fund", "acct_1", "-5"), "'-5' is not an amount of TON; write it like 1 or 0.25"),
    (("fund", "acct_1", "--", "-5"), "'-5' is not an amount of TON"),
    (("fund", "acct_1", "9" * 20), "an amount is at most 9223372036.854775807 TON"),
    (("fund", "acct_1", "0"), "more than nothing"),
    (("unpark", "1", "foo"), "a stream is job/<id> or account/<id>"),
    (("unpark", "1", "job/"), "a stream is job/<id> or account/<id>"),
    (("unpark", "1", ""), "a stream is job/<id> or account/<id>"),
    (("ban", "prov_1"), "a provider's id is prov_ and 32 digits"),
    (("keys", "revoke"), "Missing argument"),
    (("nope",), "nope"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[" ".join(w)[:20] for w, _ in WRONG])
def test_a_wrong_call_is_64(
    wrong: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["cocoon", *wrong])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 64
    told = capsys.readouterr()
    assert says in told.err
    assert told.out == ""


def test_the_help_says_how_it_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cocoon", "balance", "--help"])
    for root, program in (("/here", "./cocoon"), (None, "cocoon")):
        monkeypatch.delenv("COCOON_ROOT", raising=False)
        if root is not None:
            monkeypatch.setenv("COCOON_ROOT", root)
        with pytest.raises(SystemExit):
            main()
        assert f"Usage: {program} balance " in capsys.readouterr().out


def test_no_hint_names_a_program_that_a_checkout_lacks() -> None:
    """What a message tells people to type is `./cocoon ...`."""
    bare = re.compile(
        r"(`|then: |with: )cocoon (up|connect|keys|fund|balance|status|replay|unpark|sim|model)"
    )
    root = Path(__file__).parents[3]
    bad = []
    for path in [*root.glob("libs/**/*.py"), *root.glob("services/**/*.py")]:
        if "devnet" in path.parts:  # the development network itself; its texts speak of programs
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                bad += [f"{path}: {t}" for t in texts if isinstance(t, str) and bare.search(t)]
    assert bad == []


def test_shards_that_are_no_numbers_are_64(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        replay.main(["--shards", "0,x"])
    assert ended.value.code == 64
    assert "--shards" in capsys.readouterr().err
