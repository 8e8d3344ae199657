"""`cocoon up --engine triton` where there can be no Triton: a sentence, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cocoon.cli.app import app
from cocoon.devnet import installing, triton_server
from cocoon.kernel.errors import ConfigurationError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without anything installed, on another kind of machine."""
    shutil.copytree(REPOSITORY / "infra" / "triton", tmp_path / "infra" / "triton")
    programs = tmp_path / "bin"
    programs.mkdir()
    uname = programs / "uname"
    uname.write_text('#!/bin/sh\n[ "$1" = -s ] && echo Darwin || echo arm64\n')
    uname.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(installing, "CHECKOUT", tmp_path)
    monkeypatch.setattr(triton_server, "_CHECKOUT", tmp_path)
    return tmp_path


def up(*options: str, folder: Path) -> BaseException | None:
    done = CliRunner().invoke(app, ["up", *options, "--data", str(folder)])
    return done.exception


def test_another_platform_is_told_to_use_the_embedded_engine(checkout: Path) -> None:
    error = up("--engine", "triton", folder=checkout / "data")
    assert isinstance(error, ConfigurationError)
    assert "Linux on x86-64 only, and this is Darwin arm64" in error.message
    assert "Drop --engine triton" in error.message
    assert not (checkout / ".cocoon-triton").exists()
    assert not (checkout / "data").exists()


def test_a_backend_and_an_engine_at_once_are_refused(tmp_path: Path) -> None:
    error = up("--engine", "triton", "--backend", "http://127.0.0.1:9/v1", folder=tmp_path / "data")
    assert isinstance(error, ConfigurationError)
    assert "not both" in error.message


def test_a_server_that_is_not_installed_is_not_started(checkout: Path) -> None:
    server = triton_server.TritonServer(checkout / "triton.log")
    with pytest.raises(ConfigurationError, match="not installed"):
        server.start()
    assert server.pid is None
    server.stop()
