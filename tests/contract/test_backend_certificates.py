"""The hop from agent to engine over TLS, with the agent's certificate where the server asks."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cocoon.chat import Capabilities
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import ConfigurationError, Unavailable
from services.provider.backends.base import EngineLoad
from services.provider.backends.making import EngineSettings, backend_for
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.contract.backend_contract import MODEL, collect, request
from tests.support.engine_server import EngineServer


@dataclass
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates for one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's authority")])
        self.file = folder / "ca.pem"
        signed = self._sign(self._name, self._key, ca=True)
        self.file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def pair(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signed = self._sign(subject, key, ca=False)
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )  # fmt: skip
        return pair

    def _sign(self, subject: x509.Name, key: Any, *, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(place, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[str]:
    """An OpenAI-compatible server that lets in only who shows a certificate of this authority."""
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=8, randomness=SystemRandomness())
    await engine.start()
    pair = authority.pair("server")
    tls = {
        "ssl_certfile": str(pair.cert), "ssl_keyfile": str(pair.key),
        "ssl_ca_certs": str(authority.file), "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }  # fmt: skip
    async with EngineServer(engine, MODEL).serve(**tls) as url:
        yield url
    await engine.close()


def made(url: str, **changes: Any) -> Any:
    engine = EngineSettings(
        "openai", url=url, model=MODEL, context_tokens=640, capabilities=Capabilities(), **changes
    )
    return backend_for(engine, randomness=SystemRandomness(), load=EngineLoad())


async def test_who_shows_the_certificate_is_served(server: str, authority: Authority) -> None:
    pair = authority.pair("agent")
    backend = made(
        server, ca_file=authority.file, client_cert_file=pair.cert, client_key_file=pair.key
    )
    await backend.start()
    assert (await collect(backend, request("Reverse: cocoon", temperature=0)))[0] == "noococ"
    await backend.close()


async def test_who_shows_none_is_not_served(server: str, authority: Authority) -> None:
    backend = made(server, ca_file=authority.file)
    with pytest.raises(Unavailable):
        await backend.start()
    await backend.close()


async def test_a_server_of_another_authority_is_not_asked(
    server: str, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    pair, other = authority.pair("agent"), Authority(tmp_path / "other")
    for ca_file in (other.file, None):
        backend = made(
            server, ca_file=ca_file, client_cert_file=pair.cert, client_key_file=pair.key
        )
        with pytest.raises(Unavailable):
            await backend.start()
        await backend.close()


@pytest.mark.parametrize(
    ("url", "engine", "kind"),
    [
        ("http://10.1.2.3:8000/v1", "openai", "chat"),
        ("http://vllm.example/v1", "openai", "chat"),
        ("http://vllm.example/v1", "openai", "embeddings"),
        ("http://127.0.0.1.example/v1", "openai", "chat"),
        ("grpc://10.1.2.3:8001", "triton", "chat"),
    ],
)
def test_plain_text_to_another_host_is_refused(url: str, engine: Any, kind: Any) -> None:
    asked = EngineSettings(engine, kind=kind, url=url, model=MODEL)
    with pytest.raises(ConfigurationError, match="loopback"):
        backend_for(asked, randomness=SystemRandomness(), load=EngineLoad())


@pytest.mark.parametrize("engine", ["openai", "triton"])
def test_half_a_certificate_and_one_over_plain_text_are_refused(
    engine: Any, authority: Authority
) -> None:
    pair = authority.pair("agent")
    scheme = "http" if engine == "openai" else "grpc"
    for files in (
        {"client_cert_file": pair.cert},
        {"client_key_file": pair.key},
        {"client_cert_file": pair.cert, "client_key_file": pair.key},
    ):
        asked = EngineSettings(engine, url=f"{scheme}://127.0.0.1:1", model=MODEL, **files)
        with pytest.raises(ConfigurationError, match="certificate"):
            backend_for(asked, randomness=SystemRandomness(), load=EngineLoad())


def test_certificates_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        made("https://127.0.0.1:1", ca_file=tmp_path / "nothing.pem")


def test_embeddings_through_triton_are_refused_by_name() -> None:
    asked = EngineSettings("triton", kind="embeddings", url="grpc://127.0.0.1:1", model="m")
    with pytest.raises(ConfigurationError, match="embeddings are not served through Triton"):
        backend_for(asked, randomness=SystemRandomness(), load=EngineLoad())
