"""The bus's doors to the outside: an address, and a certificate by the devnet's own authority.

The authority's certificate is public (`GET /v1/network` tells it); its key stays in the secrets.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cocoon.devnet.folder import DataFolder
from cocoon.devnet.nats_server import LOOPBACK, Doors
from cocoon.devnet.private_file import write_private
from cocoon.kernel.errors import ConfigurationError

DEFAULT_PORT = 8643  # WebSocket; plain TLS listens on the next one
_ANY = "0.0.0.0"  # noqa: S104 - for a name that is no address of this machine's own
_DAY = dt.timedelta(days=1)
_VALID, _BACKDATED = 825 * _DAY, 1 * _DAY


@dataclass(frozen=True, slots=True)
class EntryAddress:
    """What providers dial: a name or an address of this machine."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> EntryAddress:
        """Read HOST[:PORT]. Raises ConfigurationError."""
        host, colon, port = text.rpartition(":")
        if not colon:
            host, port = text, str(DEFAULT_PORT)
        plain = host.replace(".", "").replace("-", "")
        if not plain.isalnum() or not host.isascii() or not port.isdigit():
            raise ConfigurationError(
                f"--entry {text} is not an address; write HOST or HOST:PORT, with the name or the "
                "IPv4 address under which providers reach this machine"
            )
        if not 1 <= int(port) < 65_535:
            raise ConfigurationError(f"--entry takes a port from 1 to 65534, not {port}")
        return cls(host, int(port))

    @property
    def urls(self) -> tuple[str, ...]:
        return (f"wss://{self.host}:{self.port}", f"tls://{self.host}:{self.port + 1}")

    def listen_host(self) -> str:
        """The host's own address if it is one of this machine, else every interface."""
        try:
            ipaddress.IPv4Address(self.host)
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((self.host, 0))
        except (ValueError, OSError):
            return _ANY
        return self.host


def open_doors(folder: DataFolder, address: EntryAddress) -> Doors:
    """The doors at this address, with a fresh certificate for it. Raises ConfigurationError."""
    host = address.listen_host()
    for port in (address.port, address.port + 1):
        _check_free(host, port)
    key, certificate = _certificate(folder, address.host)
    write_private(folder.bus_key, _pem(key))
    write_private(folder.bus_certificate, certificate.public_bytes(Encoding.PEM))
    return Doors(host, address.port + 1, address.port, folder.bus_certificate, folder.bus_key)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise ConfigurationError(
                f"the entry needs port {port} of {host}, and it cannot be had ({error.strerror}); "
                "name another with --entry HOST:PORT"
            ) from None


def _authority(folder: DataFolder) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The devnet's own, made once."""
    if not folder.bus_ca.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        name = _name("Cocoon DEV ONLY bus authority")
        certificate = (
            _builder(name, name, made.public_key(), 4 * _VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(made, hashes.SHA256())
        )
        write_private(folder.bus_ca_key, _pem(made))
        folder.bus_ca.write_bytes(certificate.public_bytes(Encoding.PEM))
    key = load_pem_private_key(folder.bus_ca_key.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{folder.bus_ca_key} holds no key of the bus's authority")
    return key, x509.load_pem_x509_certificate(folder.bus_ca.read_bytes())


def _certificate(
    folder: DataFolder, host: str
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    authority_key, authority = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address(LOOPBACK)),
    ]  # fmt: skip
    try:
        names.append(x509.IPAddress(ipaddress.IPv4Address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return key, (
        _builder(_name("Cocoon DEV ONLY bus"), authority.subject, key.public_key(), _VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates,
        crl_sign=signs_certificates, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
