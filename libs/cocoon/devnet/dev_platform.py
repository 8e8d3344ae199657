"""DEV ONLY platform: a machine that plays a TDX one and signs real-format quotes.

Its private keys lie in a file, so a quote from here proves nothing about any hardware.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cocoon.devnet import dev_certificates as pki
from cocoon.devnet.private_file import write_private
from cocoon.evidence.policy import TdxImage
from cocoon.kernel.errors import ConfigurationError

QE_MRSIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
NOTICE = "DEV ONLY: this plays hardware and protects nothing"
SEPT_VE_DISABLE = bytes.fromhex("0000001000000000")
_INTEL_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_TDX = 0x81
_P256 = 2
_PCK_CHAIN = 5
_QE_REPORT_DATA = 6
_TD_REPORT_10, _TD_REPORT_15 = 2, 3


def _measure(label: str) -> str:
    return hashlib.sha384(b"DEV ONLY " + label.encode()).hexdigest()


DEV_IMAGE = TdxImage(
    name="dev-only-simulated",
    mr_td=_measure("mrtd"),
    rtmr0=_measure("rtmr0"),
    rtmr1=_measure("rtmr1"),
    rtmr2=_measure("rtmr2"),
    rtmr3=_measure("rtmr3"),
)


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a quote may get wrong, one field a refusal of the verifier."""

    version: int = 4  # 5 makes a quote of version 5 with a TD report 1.5
    attestation_key_type: int = _P256
    vendor: bytes = _INTEL_VENDOR
    td_attributes: bytes = SEPT_VE_DISABLE
    xfam: bytes = bytes.fromhex("e702060000000000")
    tee_tcb_svn: bytes = bytes((6, 1, 3)) + bytes(13)
    mr_signer_seam: bytes = bytes(48)
    mr_service_td: bytes = bytes(48)
    qe_isv_svn: int = 6
    qe_debug: bool = False
    qe_mrsigner: bytes = QE_MRSIGNER
    qe_auth_data: bytes = bytes(range(32))
    bind_attestation_key: bool = True
    chain: str | None = None  # another certificate chain


@dataclass(frozen=True, slots=True)
class DevPlatform:
    """One simulated machine. Its repr shows no key."""

    chain: str  # PEM: platform certificate, platform CA, root
    pck_key: ec.EllipticCurvePrivateKey
    attestation_key: ec.EllipticCurvePrivateKey
    cpu_svn: bytes

    def __repr__(self) -> str:
        return "DevPlatform(DEV ONLY)"

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.chain.encode())

    def quote(
        self, report_data: bytes, *, image: TdxImage = DEV_IMAGE, knobs: Knobs | None = None
    ) -> bytes:
        """A signed TDX quote over 64 bytes of report data, as the hardware would give it."""
        if len(report_data) != 64:
            raise ValueError("report data are 64 bytes")
        knobs = knobs or Knobs()
        body = _td_report(report_data, image, knobs)
        header = struct.pack(
            "<HHIHH", knobs.version, knobs.attestation_key_type, _TDX, 0, 0
        ) + knobs.vendor + b"DEV ONLY".ljust(20, b"\0")  # fmt: skip
        if knobs.version == 5:
            header += struct.pack("<HI", _TD_REPORT_15, len(body))
        signed = header + body
        auth = self._auth_data(signed, knobs)
        return signed + struct.pack("<I", len(auth)) + auth

    def _auth_data(self, signed: bytes, knobs: Knobs) -> bytes:
        key = pki.public_xy(self.attestation_key)
        bound = hashlib.sha256(key + knobs.qe_auth_data).digest()
        report = self._enclave_report(bound if knobs.bind_attestation_key else bytes(32), knobs)
        chain = (knobs.chain or self.chain).encode()
        certified = (
            report
            + pki.raw_signature(self.pck_key, report)
            + struct.pack("<H", len(knobs.qe_auth_data))
            + knobs.qe_auth_data
            + struct.pack("<HI", _PCK_CHAIN, len(chain))
            + chain
        )
        return (
            pki.raw_signature(self.attestation_key, signed)
            + key
            + struct.pack("<HI", _QE_REPORT_DATA, len(certified))
            + certified
        )

    def _enclave_report(self, bound: bytes, knobs: Knobs) -> bytes:
        """The quoting enclave's report (384 bytes)."""
        flags = 0x15 | (0x02 if knobs.qe_debug else 0)
        return b"".join(
            (
                self.cpu_svn,
                bytes(4 + 28),
                bytes([flags]) + bytes(7) + b"\xe7" + bytes(7),
                hashlib.sha256(b"DEV ONLY quoting enclave").digest(),
                bytes(32),
                knobs.qe_mrsigner,
                bytes(96),
                struct.pack("<HH", 2, knobs.qe_isv_svn),
                bytes(60),
                bound.ljust(64, b"\0"),
            )
        )

    def save(self, path: Path) -> None:
        """Write the machine's keys to a file of mode 0600, to be read by one provider."""
        document = {
            "notice": NOTICE,
            "chain": self.chain,
            "pck_key": pki.key_pem(self.pck_key),
            "attestation_key": pki.key_pem(self.attestation_key),
            "cpu_svn": self.cpu_svn.hex(),
        }
        write_private(path, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> DevPlatform:
        """Read what `save` wrote. Raises ConfigurationError with a remedy."""
        try:
            document = json.loads(path.read_bytes())
            return cls(
                chain=document["chain"],
                pck_key=pki.key_from_pem(document["pck_key"]),
                attestation_key=pki.key_from_pem(document["attestation_key"]),
                cpu_svn=bytes.fromhex(document["cpu_svn"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigurationError(
                f"{path} is not a DEV ONLY platform file; remove the devnet's folder and start "
                "again with `cocoon up`"
            ) from None


def _td_report(report_data: bytes, image: TdxImage, knobs: Knobs) -> bytes:
    """The TD report: 584 bytes in a quote of version 4, 648 (report 1.5) in version 5."""
    registers = (image.rtmr0, image.rtmr1, image.rtmr2, image.rtmr3)
    report = b"".join(
        (
            knobs.tee_tcb_svn,
            hashlib.sha384(b"DEV ONLY TDX module").digest(),
            knobs.mr_signer_seam,
            bytes(8),
            knobs.td_attributes,
            knobs.xfam,
            bytes.fromhex(image.mr_td),
            bytes.fromhex(image.mr_config_id),
            bytes.fromhex(image.mr_owner),
            bytes.fromhex(image.mr_owner_config),
            *(bytes.fromhex(register) for register in registers),
            report_data,
        )
    )
    if knobs.version == 5:
        report += knobs.tee_tcb_svn + knobs.mr_service_td
    return report
