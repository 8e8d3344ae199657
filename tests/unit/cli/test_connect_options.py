"""`cocoon connect` refuses what cannot work in one sentence, before it binds a port."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cocoon.cli.app import app
from cocoon.client.network import Network, NetworkOptions
from cocoon.kernel.errors import ConfigurationError

GATEWAY = "http://127.0.0.1:9"


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["connect", *arguments])
    assert isinstance(done.exception, ConfigurationError), done.output
    assert done.output == ""
    return done.exception.message


def test_a_missing_or_broken_trust_file_is_named(tmp_path: Path) -> None:
    absent, broken = tmp_path / "absent.json", tmp_path / "broken.json"
    broken.write_text("not json")
    for file in (absent, broken):
        assert str(file) in refused("--gateway", GATEWAY, "--trust", str(file))


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8641", "http://", "http://h:port"])
def test_a_wrong_gateway_address_is_named(url: str, tmp_path: Path) -> None:
    message = refused("--gateway", url, "--trust", str(tmp_path / "t.json"))
    assert url in message
    assert "gateway" in message


@pytest.mark.parametrize("padding", ["P9", "P0", ""])
def test_a_wrong_padding_names_the_option_and_what_it_may_be(padding: str) -> None:
    message = refused("--gateway", GATEWAY, "--trust", "t", "--padding", padding)
    assert message == "--padding is one of P1, P2, P3"


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert str(key) in refused("--gateway", GATEWAY, "--trust", "t", "--key", f"@{key}")


def test_the_client_takes_paths_as_text(tmp_path: Path) -> None:
    file = str(tmp_path / "absent.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Network(NetworkOptions(gateway_url=GATEWAY, trust=file, state_dir=str(tmp_path)))
