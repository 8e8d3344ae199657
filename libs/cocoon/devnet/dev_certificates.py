"""DEV ONLY certificates and revocation lists in the form of Intel's provisioning PKI.

Real X.509 with the SGX extension, under names that say they are not Intel's.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID, ObjectIdentifier

SGX_EXTENSION = "1.2.840.113741.1.13.1"
CERTIFICATE_DAYS = 3650
_VALID_BEFORE = dt.timedelta(days=1)  # so that a clock a little behind still takes them


@dataclass(frozen=True, slots=True)
class PlatformLevel:
    """What a platform certificate says of its machine."""

    fmspc: bytes = bytes.fromhex("de0000000001")
    cpu_svn: tuple[int, ...] = (5, 5, 2, 2, 4, 1, 0, 5, *(0,) * 8)
    pce_svn: int = 13
    dynamic: bool = False
    cached_keys: bool = False
    smt: bool = False


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def key_from_pem(pem: str) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError unless it is a P-256 private key."""
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a development key is a P-256 key")  # noqa: TRY004 - one type for bad files
    return key


def raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA P-256 SHA-256 as 64 bytes r || s, the form Intel uses outside X.509."""
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def public_xy(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def pem_chain(*certificates: x509.Certificate) -> str:
    return "".join(item.public_bytes(serialization.Encoding.PEM).decode() for item in certificates)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def at(now_ms: int) -> dt.datetime:
    """The UTC time of Unix milliseconds, in whole seconds as certificates hold it."""
    return dt.datetime.fromtimestamp(now_ms // 1000, dt.UTC)


def issue(
    common_name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate | None, ec.EllipticCurvePrivateKey],
    now_ms: int,
    *,
    ca_depth: int | None = None,
    sgx_extension: bytes | None = None,
) -> x509.Certificate:
    """Issue a certificate. `issuer` is (certificate, key), None for self-signed.

    `ca_depth` is the CA's path length, None for a leaf.
    """
    issuer_certificate, issuer_key = issuer
    subject = _name(common_name)
    is_ca = ca_depth is not None
    begins = at(now_ms) - _VALID_BEFORE
    key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_certificate.subject if issuer_certificate else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + dt.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=ca_depth), critical=True)
        .add_extension(_key_usage(is_ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(key_id, critical=False)
        # the quote library asks every certificate where its revocation list is
        .add_extension(_distribution_point(), critical=False)
    )
    if sgx_extension is not None:
        oid = ObjectIdentifier(SGX_EXTENSION)
        builder = builder.add_extension(
            x509.UnrecognizedExtension(oid, sgx_extension), critical=False
        )
    return builder.sign(issuer_key, hashes.SHA256())


def revocation_list(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    window_ms: tuple[int, int],
    number: int,
    revoked: Sequence[x509.Certificate] = (),
) -> bytes:
    """A DER revocation list; `window_ms` is (this update, next update) in Unix ms."""
    this_update = at(window_ms[0])
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(this_update)
        .next_update(at(window_ms[1]))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
    )
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
        builder = builder.add_revoked_certificate(entry.revocation_date(this_update).build())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def sgx_extension(level: PlatformLevel, ppid: bytes, instance_id: bytes) -> bytes:
    """The DER of the SGX extension of a platform certificate."""

    def entry(suffix: str, value: bytes) -> bytes:
        return _sequence(_oid(SGX_EXTENSION + suffix), value)

    components = [entry(f".2.{i + 1}", _integer(svn)) for i, svn in enumerate(level.cpu_svn)]
    tcb = _sequence(
        *components,
        entry(".2.17", _integer(level.pce_svn)),
        entry(".2.18", _octets(bytes(level.cpu_svn))),
    )
    flags = _sequence(
        entry(".7.1", _boolean(level.dynamic)),
        entry(".7.2", _boolean(level.cached_keys)),
        entry(".7.3", _boolean(level.smt)),
    )
    return _sequence(
        entry(".1", _octets(ppid)),
        entry(".2", tcb),
        entry(".3", _octets(bytes(2))),
        entry(".4", _octets(level.fmspc)),
        entry(".5", _tlv(0x0A, b"\x01")),
        entry(".6", _octets(instance_id)),
        entry(".7", flags),
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"DEV ONLY {common_name}"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "DEV ONLY - NOT INTEL"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        ]
    )


def _key_usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=not is_ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _distribution_point() -> x509.CRLDistributionPoints:
    uri = x509.UniformResourceIdentifier("https://dev-only.invalid/root.crl")
    return x509.CRLDistributionPoints([x509.DistributionPoint([uri], None, None, None)])


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 128:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value


def _sequence(*items: bytes) -> bytes:
    return _tlv(0x30, b"".join(items))


def _octets(value: bytes) -> bytes:
    return _tlv(0x04, value)


def _integer(value: int) -> bytes:
    return _tlv(0x02, value.to_bytes(max(1, (value.bit_length() + 8) // 8), "big"))


def _boolean(value: bool) -> bytes:
    return _tlv(0x01, b"\xff" if value else b"\0")


def _oid(dotted: str) -> bytes:
    first, second, *rest = (int(part) for part in dotted.split("."))
    encoded = bytes([first * 40 + second])
    for part in rest:
        groups = [part & 0x7F]
        while part := part >> 7:
            groups.append(0x80 | part & 0x7F)
        encoded += bytes(reversed(groups))
    return _tlv(0x06, encoded)
