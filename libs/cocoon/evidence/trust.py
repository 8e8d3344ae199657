"""Where a client's trust starts: vendor roots, policy signers and the log's key.

They come from this package, or from a trust file that its owner names; never from a gateway.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from pydantic import Field, ValidationError

from cocoon.contracts.base import Contract, Hex32, Name
from cocoon.evidence.claims import TeeKind
from cocoon.evidence.policy import NetworkClass, wrong_place
from cocoon.kernel import canonical
from cocoon.kernel.errors import ConfigurationError

DEV_ONLY = "DEV ONLY"
_MAX_TRUST_BYTES = 64 * 1024
INTEL_SGX_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
# Intel SGX Root CA, as Intel publishes it at certificates.trustedservices.intel.com.
_INTEL_SGX_ROOT = (
    "MIICjzCCAjSgAwIBAgIUImUM1lqdNInzg7SVUr9QGzknBqwwCgYIKoZIzj0EAwIwaDEaMBgGA1UEAwwRSW50ZWwg"
    "U0dYIFJvb3QgQ0ExGjAYBgNVBAoMEUludGVsIENvcnBvcmF0aW9uMRQwEgYDVQQHDAtTYW50YSBDbGFyYTELMAkG"
    "A1UECAwCQ0ExCzAJBgNVBAYTAlVTMB4XDTE4MDUyMTEwNDUxMFoXDTQ5MTIzMTIzNTk1OVowaDEaMBgGA1UEAwwR"
    "SW50ZWwgU0dYIFJvb3QgQ0ExGjAYBgNVBAoMEUludGVsIENvcnBvcmF0aW9uMRQwEgYDVQQHDAtTYW50YSBDbGFy"
    "YTELMAkGA1UECAwCQ0ExCzAJBgNVBAYTAlVTMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEC6nEwMDIYZOj/iPW"
    "sCzaEKi71OiOSLRFhWGjbnBVJfVnkY4u3IjkDYYL0MxO4mqsyYjlBalTVYxFP2sJBK5zlKOBuzCBuDAfBgNVHSME"
    "GDAWgBQiZQzWWp00ifODtJVSv1AbOScGrDBSBgNVHR8ESzBJMEegRaBDhkFodHRwczovL2NlcnRpZmljYXRlcy50"
    "cnVzdGVkc2VydmljZXMuaW50ZWwuY29tL0ludGVsU0dYUm9vdENBLmRlcjAdBgNVHQ4EFgQUImUM1lqdNInzg7SV"
    "Ur9QGzknBqwwDgYDVR0PAQH/BAQDAgEGMBIGA1UdEwEB/wQIMAYBAf8CAQEwCgYIKoZIzj0EAwIDSQAwRgIhAOW/"
    "5QkR+S9CiSDcNoowLuPRLsWGf/Yi7GSX94BgwTwgAiEA4J0lrHoMs+Xo5o/sX6O9QWxHRAvZUGOdRQ7cvqRXaqI="
)


@dataclass(frozen=True, slots=True)
class Anchor:
    """One vendor root. A TDX root other than Intel's own is a dev one, whatever it calls itself."""

    tee: TeeKind
    der: bytes
    fingerprint: str  # SHA-256 of the DER, hex
    subject: bytes = field(repr=False)  # DER of the subject's name

    @property
    def is_dev(self) -> bool:
        return self.fingerprint != INTEL_SGX_ROOT_SHA256


def anchor(tee: TeeKind, der: bytes) -> Anchor:
    """Read a root certificate. Raises ValueError if it is not one in DER."""
    try:
        certificate = x509.load_der_x509_certificate(der)
    except x509.InvalidVersion:  # the library's own kind of error, and no ValueError
        raise ValueError("the root is a certificate of an unknown version") from None
    subject = certificate.subject.public_bytes()
    return Anchor(tee, der, hashlib.sha256(der).hexdigest(), subject)


def intel_anchor() -> Anchor:
    """Intel's root, as it comes with this package."""
    return anchor(TeeKind.TDX, base64.b64decode(_INTEL_SGX_ROOT))


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """What a verifier may start from. Keys are 32-byte Ed25519 public keys."""

    network_id: str
    network_class: NetworkClass
    anchors: tuple[Anchor, ...]
    policy_signers: tuple[bytes, ...]
    policy_threshold: int
    log_key: bytes

    @property
    def is_dev(self) -> bool:
        return self.network_class == "dev"


class _AnchorEntry(Contract):
    tee: Literal["tdx"]
    name: Annotated[str, Field(max_length=128)]
    der: Annotated[str, Field(max_length=8192)]


class _TrustDocument(Contract):
    format: Literal[1]
    notice: Annotated[str, Field(max_length=512)] = ""
    network_id: Name
    network_class: NetworkClass
    anchors: Annotated[tuple[_AnchorEntry, ...], Field(max_length=4)] = ()
    policy_signers: Annotated[tuple[Hex32, ...], Field(min_length=1, max_length=32)]
    policy_threshold: Annotated[int, Field(ge=1, le=32)]
    log_key: Hex32


def load_trust(path: Path | str) -> TrustAnchors:
    """Read the trust file that `--trust FILE` names. Raises ConfigurationError with a remedy."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"the trust file {path} cannot be read ({error.strerror}); name the network's file"
        ) from None
    try:
        return parse_trust(data)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def parse_trust(data: bytes) -> TrustAnchors:
    """Parse a trust file's JSON. No anchors listed means the vendor roots of this package.

    Raises ConfigurationError with a plain sentence for every fault.
    """
    if len(data) > _MAX_TRUST_BYTES:
        raise ConfigurationError("the trust file is larger than 64 KiB; it cannot be right")
    try:
        document = _TrustDocument.model_validate(canonical.loads_object(data, strict=False))
    except ValidationError as error:
        raise ConfigurationError(
            f"the trust file is wrong at {wrong_place(error)!r}; take the network's own file again"
        ) from None
    except ValueError:
        raise ConfigurationError(
            "the trust file is not JSON; take the network's own file again"
        ) from None
    return _checked(document)


def _checked(document: _TrustDocument) -> TrustAnchors:
    if len(set(document.policy_signers)) != len(document.policy_signers):
        raise ConfigurationError("the trust file lists a policy signer twice; list each once")
    if document.policy_threshold > len(document.policy_signers):
        raise ConfigurationError(
            "the trust file asks for more policy signatures than it has signers"
        )
    anchors = tuple(_read_anchor(entry) for entry in document.anchors) or (intel_anchor(),)
    if document.network_class == "prod" and any(item.is_dev for item in anchors):
        raise ConfigurationError(
            "the trust file is of class prod but holds a root that is not Intel's; "
            "a development root needs a dev trust file"
        )
    if document.network_class == "dev" and DEV_ONLY not in document.notice:
        raise ConfigurationError(
            f'the trust file is of class dev but its notice does not say "{DEV_ONLY}"'
        )
    return TrustAnchors(
        network_id=document.network_id,
        network_class=document.network_class,
        anchors=anchors,
        policy_signers=tuple(bytes.fromhex(key) for key in document.policy_signers),
        policy_threshold=document.policy_threshold,
        log_key=bytes.fromhex(document.log_key),
    )


def _read_anchor(entry: _AnchorEntry) -> Anchor:
    try:
        found = anchor(TeeKind.TDX, base64.b64decode(entry.der, validate=True))
    except ValueError:
        raise ConfigurationError(
            f"the trust file's root {entry.name!r} is not a certificate in DER, base64"
        ) from None
    if found.is_dev and DEV_ONLY not in entry.name:
        raise ConfigurationError(
            f"the trust file's root {entry.name!r} is not a vendor's, so its name must say "
            f'"{DEV_ONLY}"'
        )
    return found


def trust_document(trust: TrustAnchors) -> bytes:
    """The trust file's bytes for these anchors: what `cocoon up` writes for its own network."""
    dev = trust.is_dev
    document = _TrustDocument(
        format=1,
        notice=f"{DEV_ONLY}: these roots protect nothing" if dev else "",
        network_id=trust.network_id,
        network_class=trust.network_class,
        anchors=tuple(
            _AnchorEntry(
                tee="tdx",
                name=f"{DEV_ONLY} TDX root" if item.is_dev else "Intel SGX Root CA",
                der=base64.b64encode(item.der).decode(),
            )
            for item in trust.anchors
        ),
        policy_signers=tuple(key.hex() for key in trust.policy_signers),
        policy_threshold=trust.policy_threshold,
        log_key=trust.log_key.hex(),
    )
    return document.to_canonical()
