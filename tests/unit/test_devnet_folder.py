"""Whose folder it is: a network starts in its own or an empty one and removes only what it made."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cocoon.cli.app import app
from cocoon.cli.up import _start_afresh
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.identity import make_identity, provider_names
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]


def refused(data: str, *options: str) -> str:
    done = CliRunner().invoke(app, ["up", "--data", data, *options])
    assert isinstance(done.exception, ConfigurationError), done.output
    return done.exception.message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("options", [(), ("--fresh",)])
@pytest.mark.parametrize("file", ["letter.txt", "logs/mine.log", "provider/one", "trust.json"])
def test_a_folder_with_files_that_no_network_made_is_refused_and_left(
    tmp_path: Path, file: str, options: tuple[str, ...]
) -> None:
    mine = tmp_path / file
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("dear")
    before = names(tmp_path)
    message = refused(str(tmp_path), *options)
    assert message.startswith(f"{tmp_path} holds files and is not a network's folder")
    assert "--data DIR" in message
    assert (mine.read_text(), names(tmp_path)) == ("dear", before)


def test_an_empty_name_home_and_the_checkout_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("").startswith("--data is empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert refused(".", "--fresh").startswith(f"{tmp_path} is your home folder")
    assert refused(str(ROOT)).startswith(f"{ROOT} is Cocoon's")
    assert names(tmp_path) == []


def test_what_is_empty_new_or_cut_off_at_once_may_be_taken(tmp_path: Path) -> None:
    DataFolder(tmp_path / "new").check_ours()
    DataFolder(tmp_path).check_ours()
    folder = DataFolder(tmp_path / "cut")
    with folder.lock():
        folder.prepare()
    folder.check_ours()


def test_manifests_may_be_there_before_the_network(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.models.mkdir()
    (folder.models / "skills-1.json").write_text("{}")
    folder.check_ours()
    (folder.models / "weights.bin").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a network's folder"):
        folder.check_ours()


def test_fresh_removes_what_the_network_made_and_says_so(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    with folder.lock():
        folder.prepare()
        make_identity(folder, (0, 1), SystemClock(), provider_names(2))
        folder.keep_account_shards(1)
        folder.write_processes({})
        for name in ("postgres", "nats", "sidecar", "provider"):
            (folder.root / name).mkdir()
        folder.models.mkdir()
        mine = folder.root / "notes"
        mine.mkdir()
        (mine / "one.txt").write_text("dear")
        made = [name for name in names(folder.root) if name not in ("lock", "models", "notes")]
        folder.check_ours()

        said: list[str] = []
        _start_afresh(folder, said.append)

        assert names(folder.root) == ["lock", "models", "notes"]
        assert (mine / "one.txt").read_text() == "dear"
        assert said == [
            f"starting afresh in {folder.root}: removed {', '.join(made)}",
            "left alone, for no network made it: models, notes",
        ]
