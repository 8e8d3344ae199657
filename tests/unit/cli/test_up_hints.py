"""What `cocoon up` refuses before it starts, and what it tells people to paste."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cocoon.cli.app import app
from cocoon.cli.session import data_hint
from cocoon.cli.up import _python
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.network import Network, Options
from cocoon.devnet.ports import free_port_after
from cocoon.kernel.errors import ConfigurationError


def test_a_model_without_a_backend_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["up", "--model", "foo", "--data", str(tmp_path / "new")])
    assert isinstance(done.exception, ConfigurationError)
    assert "--backend" in done.exception.message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", ["skills-1", "org/Model:7b", 'it\'s `id` $HOME "!" \\n'])
def test_the_pasted_python_reaches_python_whole(model: str) -> None:
    text = _python("http://127.0.0.1:1/v1", model)
    assert not set(text) & set('$`!"')
    passed = subprocess.run(
        ["bash", "-c", f'printf %s "{text}"'], capture_output=True, text=True, check=True
    ).stdout
    assert passed == text
    compile(passed, "pasted", "exec")
    literal = passed.split("model='", 1)[1].split("'", 1)[0]
    assert literal.encode("ascii").decode("unicode_escape") == model


def test_hints_name_the_folder_unless_it_is_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCOON_ROOT", str(tmp_path))
    assert data_hint(DataFolder(tmp_path / ".cocoon")) == ""
    other = tmp_path / "a b" / ".cocoon"
    assert shlex.split(data_hint(DataFolder(other))) == ["--data", str(other)]


def test_a_usual_port_that_is_taken_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("cocoon.devnet.network.DEFAULT_GATEWAY_PORT", port)
        said: list[str] = []
        network = Network(DataFolder(tmp_path), Options(sidecar_port=0), said.append)
    instead = int(network.gateway_url.rsplit(":", 1)[1])
    assert port < instead <= port + 20
    assert said == [f"port {port} is taken; the gateway listens on {instead}"]


def test_the_two_doors_never_take_each_others_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoon.devnet.ports.is_free", lambda port: port != 4641)
    monkeypatch.setattr("cocoon.devnet.network.is_free", lambda port: port != 4641)
    monkeypatch.setattr("cocoon.devnet.network.DEFAULT_GATEWAY_PORT", 4641)
    monkeypatch.setattr("cocoon.devnet.network.DEFAULT_SIDECAR_PORT", 4642)

    def ports(**options: int) -> list[str]:
        network = Network(DataFolder(tmp_path), Options(**options), lambda _: None)
        return [network.gateway_url, network.sidecar_url]

    assert ports() == ["http://127.0.0.1:4643", "http://127.0.0.1:4642/v1"]
    assert ports(gateway_port=4642) == ["http://127.0.0.1:4642", "http://127.0.0.1:4643/v1"]
    assert ports(sidecar_port=4643) == ["http://127.0.0.1:4642", "http://127.0.0.1:4643/v1"]
    with pytest.raises(ConfigurationError, match="port 4650 is the other door's"):
        ports(gateway_port=4650, sidecar_port=4650)


def test_with_no_free_port_near_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoon.devnet.ports.is_free", lambda port: port > 10_000)
    assert free_port_after(4641) > 10_000
    assert free_port_after(65_535) < 65_535
