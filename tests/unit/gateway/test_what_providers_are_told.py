"""Where the bus is, and the authority behind its certificates, as `GET /v1/network` tells."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import pytest

from cocoon.devnet.doors import EntryAddress, open_doors
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import ConfigurationError
from services.gateway.routes import bus_told
from services.gateway.settings import GatewaySettings


def settings(tmp_path: Path, ca_file: Path | None) -> GatewaySettings:
    return GatewaySettings(
        nats_url="nats://127.0.0.1:1", postgres_dsn_file=tmp_path / "dsn",
        bus_urls=("wss://bus.example:443",), bus_ca_file=ca_file,
    )  # fmt: skip


def test_a_private_authority_is_told_with_its_digest(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    address = EntryAddress("127.0.0.1", free_port())
    doors = open_doors(folder, address)
    told = bus_told(settings(tmp_path, folder.bus_ca))
    pem = folder.bus_ca.read_text()
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    assert told == {"urls": ["wss://bus.example:443"], "ca_pem": pem, "ca_sha256": digest}
    assert "PRIVATE" not in pem
    first = doors.certificate_file.read_bytes()
    assert open_doors(folder, address).certificate_file.read_bytes() != first
    assert folder.bus_ca.read_text() == pem  # providers keep the authority that they were told
    for secret in (folder.bus_key, folder.bus_ca_key):
        assert secret.stat().st_mode & 0o777 == 0o600


def test_a_public_authority_is_told_by_nothing(tmp_path: Path) -> None:
    told = bus_told(settings(tmp_path, None))
    assert (told["ca_pem"], told["ca_sha256"]) == (None, None)


@pytest.mark.parametrize("text", [None, "", "hello", "-----BEGIN CERTIFICATE-----\n", "é"])
def test_what_is_no_certificate_is_a_sentence(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="certificate in PEM"):
        bus_told(settings(tmp_path, path))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.1", "10.0.0.1", 8643), ("bus.example:443", "bus.example", 443)],
)
def test_an_entry_is_a_host_and_perhaps_a_port(text: str, host: str, port: int) -> None:
    found = EntryAddress.parse(text)
    assert (found.host, found.port) == (host, port)
    assert found.urls == (f"wss://{host}:{port}", f"tls://{host}:{port + 1}")


@pytest.mark.parametrize(
    "text", ["", ":443", "a b", "a:", "a:x", "a:0", "a:65535", "é", "a/b", "::1"]
)
def test_an_entry_that_is_no_address_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--entry"):
        EntryAddress.parse(text)
