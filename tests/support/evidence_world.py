"""A development network's hardware, policy and evidence: the attestation tests' world."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from nacl.signing import SigningKey

from cocoon.devnet.authority import UP_TO_DATE, CollateralKnobs, DevAuthority, dev_policy, dev_trust
from cocoon.devnet.dev_certificates import PlatformLevel
from cocoon.devnet.dev_platform import DEV_IMAGE, DevPlatform, Knobs
from cocoon.evidence import claims as binding
from cocoon.evidence.claims import Claims, TeeKind
from cocoon.evidence.collateral import NO_FLOORS, CollateralFloors
from cocoon.evidence.policy import Policy, SignedPolicy, TdxImage, sign
from cocoon.evidence.provider import ProviderEvidence, verify_provider
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Verdict

NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
NETWORK = "cocoon-test"
SIGNER = bytes(range(32))
LOG_KEY = hashlib.sha256(b"log").digest()
MODEL = hashlib.sha256(b"model").hexdigest()
ROOT = hashlib.sha256(b"checkpoint")
RANDOM = hashlib.sha256(b"random")
PROVIDER = "prov_" + "a" * 32
PPID = bytes(range(16))
AS_IT_SHOULD_BE = Knobs()
FMSPC = UP_TO_DATE.fmspc.hex()


@cache
def authority() -> DevAuthority:
    return DevAuthority.create(NOW_MS)


@cache
def _platform(level: PlatformLevel) -> DevPlatform:
    return authority().platform(NOW_MS, level, ppid=PPID)


def platform(level: PlatformLevel = UP_TO_DATE) -> DevPlatform:
    return _platform(level)


@cache
def collateral() -> str:
    return authority().collateral(NOW_MS - HOUR_MS)


@cache
def trust() -> TrustAnchors:
    return dev_trust(authority(), NETWORK, bytes(SigningKey(SIGNER).verify_key), LOG_KEY)


def policy(**changes: Any) -> Policy:
    return dev_policy(authority(), changes.pop("network_id", NETWORK), **changes)


CLAIMS = Claims(
    tee=TeeKind.TDX,
    x25519_public=hashlib.sha256(b"x25519").digest(),
    ed25519_public=hashlib.sha256(b"ed25519").digest(),
    key_epoch=7,
    not_before_ms=NOW_MS - 60_000,
    not_after_ms=NOW_MS + HOUR_MS,
    models_root=binding.models_root([bytes.fromhex(MODEL)]),
    config_hash=hashlib.sha256(b"config").digest(),
    gpu_evidence_hash=binding.NO_GPU,
    challenge=binding.challenge(ROOT.digest(), PROVIDER, RANDOM.digest()),
)


@dataclass(frozen=True)
class Scene:
    """One attempt to be admitted; every field is something that may be wrong with it."""

    level: PlatformLevel = UP_TO_DATE
    knobs: Knobs = AS_IT_SHOULD_BE
    image: TdxImage = DEV_IMAGE
    claims: dict[str, Any] = field(default_factory=dict)
    report_data: bytes | None = None
    quote: Any = None  # changes the quote's bytes
    collateral: Any = None  # CollateralKnobs, or a function over the parsed JSON, or text
    collateral_at_ms: int = NOW_MS - HOUR_MS
    fmspc: bytes = bytes.fromhex(FMSPC)
    policy: dict[str, Any] = field(default_factory=dict)
    signers: tuple[bytes, ...] = (SIGNER,)
    trust: dict[str, Any] = field(default_factory=dict)
    floors: CollateralFloors = NO_FLOORS
    evidence: dict[str, Any] = field(default_factory=dict)
    now_ms: int = NOW_MS

    def signed_policy(self) -> SignedPolicy:
        return sign(policy(**self.policy), self.signers)

    def collateral_text(self) -> str:
        knobs = self.collateral if isinstance(self.collateral, CollateralKnobs) else None
        text = authority().collateral(self.collateral_at_ms, fmspc=self.fmspc, knobs=knobs)
        if callable(self.collateral):
            return json.dumps(self.collateral(json.loads(text)))
        return self.collateral if isinstance(self.collateral, str) else text

    def provider_evidence(self) -> ProviderEvidence:
        encoded = replace(CLAIMS, **self.claims).encode()
        quote = platform(self.level).quote(
            self.report_data or binding.report_data(encoded), image=self.image, knobs=self.knobs
        )
        fields: dict[str, Any] = {
            "tee": "tdx",
            "provider_id": PROVIDER,
            "quote": self.quote(quote) if self.quote else quote,
            "collateral": self.collateral_text(),
            "claims": encoded,
            "models": (MODEL,),
            "checkpoint_root": ROOT.hexdigest(),
            "challenge_random": RANDOM.hexdigest(),
        }
        return ProviderEvidence(**{**fields, **self.evidence})

    def verdict(self) -> Verdict:
        return verify_provider(
            self.provider_evidence(),
            replace(trust(), **self.trust),
            self.signed_policy(),
            self.floors,
            self.now_ms,
        )
