"""DEV ONLY authority: plays Intel for a development network, under roots of its own.

Its quotes and collateral have the real format, so the verifier runs the same lines as on real
hardware. They count only where a dev trust file and a dev policy name its root.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cocoon.devnet import dev_certificates as pki
from cocoon.devnet.dev_certificates import PlatformLevel
from cocoon.devnet.dev_platform import DEV_IMAGE, NOTICE, QE_MRSIGNER, DevPlatform
from cocoon.devnet.private_file import write_private
from cocoon.evidence.claims import TeeKind
from cocoon.evidence.policy import Policy
from cocoon.evidence.trust import Anchor, TrustAnchors, anchor
from cocoon.kernel.errors import ConfigurationError

_DAY_MS = 86_400_000
UP_TO_DATE = PlatformLevel()
SW_HARDENING = PlatformLevel(cpu_svn=(4, 4, 2, 2, 4, 1, 0, 5, *(0,) * 8))
OUT_OF_DATE = PlatformLevel(cpu_svn=(2, 2, 2, 2, 3, 1, 0, 5, *(0,) * 8), pce_svn=11)
UNLISTED = PlatformLevel(cpu_svn=(1,) * 16, pce_svn=1)
# (platform level, TDX components, status, days since its date, advisories), best first
_LEVELS = (
    (UP_TO_DATE, (6, 1, 3), "UpToDate", 1, ()),
    (SW_HARDENING, (6, 1, 3), "SWHardeningNeeded", 31, ("DEV-SA-00002",)),
    (OUT_OF_DATE, (5, 1, 2), "OutOfDate", 61, ("DEV-SA-00001",)),
)


@dataclass(frozen=True, slots=True)
class CollateralKnobs:
    """What collateral may get wrong, one field a refusal of the verifier."""

    valid_days: int = 30
    evaluation_number: int = 100
    root_crl_number: int = 1
    pck_crl_number: int = 1
    revoked_by_root: Sequence[x509.Certificate] = ()
    revoked_by_pck_ca: Sequence[x509.Certificate] = ()
    tcb_id: str = "TDX"
    qe_id: str = "TD_QE"
    qe_status: str = "UpToDate"
    statuses: tuple[str, str, str] | None = None  # instead of the three levels' own
    signer: DevPlatform | None = None  # a platform's key in the TCB signer's place


@dataclass(frozen=True, slots=True)
class DevAuthority:
    """Root, platform CA and TCB signer with their keys. Its repr shows none of them."""

    root: x509.Certificate
    root_key: ec.EllipticCurvePrivateKey
    pck_ca: x509.Certificate
    pck_ca_key: ec.EllipticCurvePrivateKey
    tcb_signer: x509.Certificate
    tcb_signer_key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return "DevAuthority(DEV ONLY)"

    @classmethod
    def create(cls, now_ms: int) -> DevAuthority:
        """A new authority whose certificates are valid from a day before `now_ms`."""
        root_key, ca_key, tcb_key = pki.new_key(), pki.new_key(), pki.new_key()
        root = pki.issue("SGX Root CA", root_key, (None, root_key), now_ms, ca_depth=1)
        under_root = (root, root_key)
        ca = pki.issue("SGX PCK Platform CA", ca_key, under_root, now_ms, ca_depth=0)
        tcb = pki.issue("SGX TCB Signing", tcb_key, under_root, now_ms)
        return cls(root, root_key, ca, ca_key, tcb, tcb_key)

    @property
    def anchor(self) -> Anchor:
        """The root as a trust file holds it. It is a dev anchor whatever it is called."""
        return anchor(TeeKind.TDX, pki.der(self.root))

    def platform(
        self, now_ms: int, level: PlatformLevel = UP_TO_DATE, ppid: bytes | None = None
    ) -> DevPlatform:
        """A new simulated machine with its own keys and certificate."""
        key = pki.new_key()
        extension = pki.sgx_extension(
            level, ppid or secrets.token_bytes(16), secrets.token_bytes(16)
        )
        certificate = pki.issue(
            "SGX PCK Certificate", key, (self.pck_ca, self.pck_ca_key), now_ms,
            sgx_extension=extension,
        )  # fmt: skip
        return DevPlatform(
            chain=pki.pem_chain(certificate, self.pck_ca, self.root),
            pck_key=key,
            attestation_key=pki.new_key(),
            cpu_svn=bytes(level.cpu_svn),
        )

    def collateral(
        self,
        now_ms: int,
        *,
        fmspc: bytes = UP_TO_DATE.fmspc,
        knobs: CollateralKnobs | None = None,
    ) -> str:
        """Signed collateral for one FMSPC, as JSON text, valid from `now_ms` on."""
        knobs = knobs or CollateralKnobs()
        window_ms = (now_ms, now_ms + knobs.valid_days * _DAY_MS)
        tcb_info = _compact(_tcb_info(window_ms, fmspc, knobs))
        qe_identity = _compact(_qe_identity(window_ms, knobs))
        signer_key = knobs.signer.pck_key if knobs.signer else self.tcb_signer_key
        signer_chain = (
            knobs.signer.chain if knobs.signer else pki.pem_chain(self.tcb_signer, self.root)
        )
        root_crl = pki.revocation_list(
            self.root, self.root_key, window_ms, knobs.root_crl_number, knobs.revoked_by_root
        )
        pck_crl = pki.revocation_list(
            self.pck_ca, self.pck_ca_key, window_ms, knobs.pck_crl_number, knobs.revoked_by_pck_ca
        )
        return _compact(
            {
                "pck_crl_issuer_chain": pki.pem_chain(self.pck_ca, self.root),
                "root_ca_crl": root_crl.hex(),
                "pck_crl": pck_crl.hex(),
                "tcb_info_issuer_chain": signer_chain,
                "tcb_info": tcb_info,
                "tcb_info_signature": pki.raw_signature(signer_key, tcb_info.encode()).hex(),
                "qe_identity_issuer_chain": signer_chain,
                "qe_identity": qe_identity,
                "qe_identity_signature": pki.raw_signature(signer_key, qe_identity.encode()).hex(),
            }
        )

    def save(self, path: Path) -> None:
        """Write certificates and keys to a file of mode 0600."""
        document = {"notice": NOTICE}
        for name in ("root", "pck_ca", "tcb_signer"):
            document[name] = pki.pem_chain(getattr(self, name))
            document[f"{name}_key"] = pki.key_pem(getattr(self, f"{name}_key"))
        write_private(path, json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> DevAuthority:
        """Read what `save` wrote. Raises ConfigurationError with a remedy."""
        try:
            document = json.loads(path.read_bytes())
            parts: dict[str, Any] = {}
            for name in ("root", "pck_ca", "tcb_signer"):
                parts[name] = x509.load_pem_x509_certificate(document[name].encode())
                parts[f"{name}_key"] = pki.key_from_pem(document[f"{name}_key"])
            return cls(**parts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigurationError(
                f"{path} is not a DEV ONLY authority file; remove the devnet's folder and start "
                "again with `cocoon up`"
            ) from None


def dev_trust(
    authority: DevAuthority, network_id: str, policy_signer: bytes, log_key: bytes
) -> TrustAnchors:
    """The trust of a development network; `evidence.trust.trust_document` makes its file."""
    return TrustAnchors(
        network_id=network_id,
        network_class="dev",
        anchors=(authority.anchor,),
        policy_signers=(policy_signer,),
        policy_threshold=1,
        log_key=log_key,
    )


def dev_policy(authority: DevAuthority, network_id: str, **changes: Any) -> Policy:
    """A development network's first policy: the simulated image under this authority's root."""
    fields: dict[str, Any] = {
        "network_id": network_id,
        "network_class": "dev",
        "version": 1,
        "anchors": (authority.anchor.fingerprint,),
        "images": (DEV_IMAGE,),
    }
    return Policy(**{**fields, **changes})


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _iso(now_ms: int) -> str:
    return pki.at(now_ms).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tcb_info(
    window_ms: tuple[int, int], fmspc: bytes, knobs: CollateralKnobs
) -> dict[str, object]:
    issued_ms = window_ms[0]
    zeros = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    statuses = knobs.statuses or tuple(level[2] for level in _LEVELS)
    levels = []
    for status, (platform, tdx_svns, _, age_days, advisories) in zip(
        statuses, _LEVELS, strict=True
    ):
        tcb = {
            "sgxtcbcomponents": [{"svn": svn} for svn in platform.cpu_svn],
            "pcesvn": platform.pce_svn,
            "tdxtcbcomponents": [{"svn": svn} for svn in (*tdx_svns, *(0,) * 13)],
        }
        date = _iso(issued_ms - age_days * _DAY_MS)
        levels.append(
            {"tcb": tcb, "tcbDate": date, "tcbStatus": status, "advisoryIDs": list(advisories)}
        )
    modules = [
        {"tcb": {"isvsvn": 6}, "tcbDate": _iso(issued_ms), "tcbStatus": "UpToDate"},
        {"tcb": {"isvsvn": 4}, "tcbDate": _iso(issued_ms), "tcbStatus": "OutOfDate"},
    ]
    return {
        "id": knobs.tcb_id,
        "version": 3,
        "issueDate": _iso(issued_ms),
        "nextUpdate": _iso(window_ms[1]),
        "fmspc": fmspc.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": knobs.evaluation_number,
        "tdxModule": zeros,
        "tdxModuleIdentities": [{"id": "TDX_01", **zeros, "tcbLevels": modules}],
        "tcbLevels": levels,
    }


def _qe_identity(window_ms: tuple[int, int], knobs: CollateralKnobs) -> dict[str, object]:
    issued_ms = window_ms[0]
    level = {
        "tcb": {"isvsvn": 4},
        "tcbDate": _iso(issued_ms - 10 * _DAY_MS),
        "tcbStatus": knobs.qe_status,
    }
    return {
        "id": knobs.qe_id,
        "version": 2,
        "issueDate": _iso(issued_ms),
        "nextUpdate": _iso(window_ms[1]),
        "tcbEvaluationDataNumber": knobs.evaluation_number,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11" + "00" * 15,
        "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
        "mrsigner": QE_MRSIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [level],
    }
