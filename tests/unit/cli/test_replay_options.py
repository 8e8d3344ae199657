"""`cocoon replay`: a wrong call must not look like a corrupt log."""

from __future__ import annotations

import sys

import pytest

from cocoon.cli.app import main
from services.billing import replay


@pytest.mark.parametrize("wrong", [["--nope"], ["--from", "0"], ["--to", "x"]])
def test_a_wrong_call_is_64(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cocoon", "replay", *wrong])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 64


def test_shards_that_are_no_numbers_are_64(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        replay.main(["--shards", "0,x"])
    assert ended.value.code == 64
    assert "--shards" in capsys.readouterr().err
