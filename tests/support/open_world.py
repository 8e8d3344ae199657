"""A provider without a TEE: its identity, its signed claims, and a policy that has an open tier."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from nacl.signing import SigningKey

from cocoon.evidence import claims as binding
from cocoon.evidence.claims import TeeKind
from cocoon.evidence.collateral import NO_FLOORS
from cocoon.evidence.open_tier import make_statement
from cocoon.evidence.policy import OpenTierRules, SignedPolicy, sign
from cocoon.evidence.provider import ProviderEvidence, verify_provider
from cocoon.evidence.verdict import Verdict
from cocoon.kernel.ids import provider_id
from tests.support.evidence_world import CLAIMS, MODEL, NOW_MS, RANDOM, ROOT, SIGNER, policy, trust

IDENTITY = SigningKey(hashlib.sha256(b"identity").digest())
STRANGER = SigningKey(hashlib.sha256(b"stranger").digest())
PROVIDER = provider_id(bytes(IDENTITY.verify_key))
RULES = OpenTierRules(
    allowed=True, max_running_jobs=2, max_job_nanoton=1_000_000, max_providers=2
)  # fmt: skip
CLOSED = RULES.model_copy(update={"allowed": False})
OPEN_CLAIMS = replace(
    CLAIMS,
    tee=TeeKind.NONE,
    challenge=binding.challenge(ROOT.digest(), PROVIDER, RANDOM.digest()),
)


@dataclass(frozen=True)
class OpenScene:
    """One attempt to enter the open tier; every field is something that may be wrong with it."""

    claims: dict[str, Any] = field(default_factory=dict)
    identity: SigningKey = IDENTITY
    report_data: bytes | None = None
    statement: Any = None  # changes the statement's bytes
    policy: dict[str, Any] = field(default_factory=dict)
    trust: dict[str, Any] = field(default_factory=dict)
    signers: tuple[bytes, ...] = (SIGNER,)
    evidence: dict[str, Any] = field(default_factory=dict)
    now_ms: int = NOW_MS

    def signed_policy(self) -> SignedPolicy:
        return sign(policy(**{"open_tier": RULES, **self.policy}), self.signers)

    def provider_evidence(self) -> ProviderEvidence:
        encoded = replace(OPEN_CLAIMS, **self.claims).encode()
        statement = make_statement(self.identity, self.report_data or binding.report_data(encoded))
        fields: dict[str, Any] = {
            "tee": "none",
            "provider_id": PROVIDER,
            "quote": self.statement(statement) if self.statement else statement,
            "claims": encoded,
            "models": (MODEL,),
            "checkpoint_root": ROOT.hexdigest(),
            "challenge_random": RANDOM.hexdigest(),
        }
        return ProviderEvidence(**{**fields, **self.evidence})

    def verdict(self) -> Verdict:
        return verify_provider(
            self.provider_evidence(), replace(trust(), **self.trust), self.signed_policy(),
            NO_FLOORS, self.now_ms,
        )  # fmt: skip
