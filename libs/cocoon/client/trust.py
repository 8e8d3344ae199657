"""Which providers this client believes: evidence verified here, under the owner's trust file.

Verdicts are remembered until they end; floors and the policy's version only rise and survive a
restart where a state directory is given. Nothing a gateway sends is ever an anchor.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cocoon.client import files
from cocoon.contracts.base import Contract, Count, Name
from cocoon.evidence import policy as rules
from cocoon.evidence.collateral import NO_FLOORS, CollateralFloors
from cocoon.evidence.policy import SignedPolicy
from cocoon.evidence.provider import ProviderEvidence, verify_provider
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Assurance, Outcome, Verdict
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import ConfigurationError, EvidenceRejected

MAX_VERDICTS = 1024
REJECT_MEMORY_MS = 60_000  # a refusal is looked at again after this, an undecided one sooner
ERROR_MEMORY_MS = 5_000
_VERIFYING_THREADS = 2
_STATE_FILE = "trust-state.json"
_MAX_STATE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Attested:
    """A provider whose evidence holds: what a request may be sealed by."""

    provider_id: str
    evidence_id: bytes
    signing_key: bytes  # the attested Ed25519 key, 32 bytes
    models: frozenset[str]
    assurance: Assurance
    valid_until_ms: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A provider whose evidence does not hold, and which check failed."""

    provider_id: str
    code: str
    sentence: str


class _State(Contract):
    """What must never go back, per network."""

    network_id: Name
    policy_version: Count = 0
    floors: CollateralFloors = NO_FLOORS


class TrustKeeper:
    """Verifies evidence off the loop, at most two at a time, and remembers what it found."""

    def __init__(
        self, trust: TrustAnchors, *, clock: Clock, state_dir: Path | str | None = None
    ) -> None:
        self.trust = trust
        self._clock = clock
        self._path = None if state_dir is None else Path(state_dir) / _STATE_FILE
        self._state = self._load()
        self._verdicts: OrderedDict[bytes, tuple[int, Attested | Refused]] = OrderedDict()
        self._threads = asyncio.Semaphore(_VERIFYING_THREADS)

    def accept_policy(self, signed: SignedPolicy) -> bytes:
        """Check the network's policy and return its hash (32 bytes).

        Raises EvidenceRejected: policy_unsigned, dev_anchor, policy_rollback, policy_suites.
        """
        policy, trust = signed.policy, self.trust
        if (
            not rules.verify(signed, trust.policy_signers, trust.policy_threshold)
            or policy.network_id != trust.network_id
        ):
            raise EvidenceRejected(
                "The gateway's policy is not signed for the network that the trust file names; "
                "check the gateway's address and the trust file.",
                code="policy_unsigned",
            )
        if policy.network_class == "dev" and not trust.is_dev:
            raise EvidenceRejected(
                "The gateway offers a DEV ONLY policy to a production trust file; nothing was "
                "sent.",
                code="dev_anchor",
            )
        if policy.version < self._state.policy_version:
            raise EvidenceRejected(
                f"The gateway offers policy version {policy.version}, older than version "
                f"{self._state.policy_version} that was seen before; nothing was sent.",
                code="policy_rollback",
            )
        if 1 not in policy.suites:
            raise EvidenceRejected(
                "The policy does not allow suite 1, the only one that this client speaks; "
                "update Cocoon.",
                code="policy_suites",
            )
        if policy.version > self._state.policy_version:
            self._keep(self._state.model_copy(update={"policy_version": policy.version}))
        return rules.policy_hash(policy)

    async def judge(self, evidence: ProviderEvidence, signed: SignedPolicy) -> Attested | Refused:
        """Verify one provider's evidence, or return what is still known about these bytes."""
        bare = evidence.model_copy(update={"bundles": ()})  # bundles rotate and are checked apart
        key = hashlib.sha256(rules.policy_hash(signed.policy) + bare.to_canonical()).digest()
        now_ms = self._clock.now_ms()
        known = self._verdicts.get(key)
        if known is not None and now_ms < known[0]:
            self._verdicts.move_to_end(key)
            return known[1]
        async with self._threads:
            verdict = await asyncio.to_thread(
                verify_provider, bare, self.trust, signed, self._state.floors, now_ms
            )
        if verdict.floors is not None:
            self._raise_floors(verdict.floors)
        found, until_ms = _summary(bare, verdict, now_ms)
        self._verdicts[key] = (until_ms, found)
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return found

    def _raise_floors(self, seen: CollateralFloors) -> None:
        floors = self._state.floors
        for fmspc, floor in seen.by_fmspc.items():
            floors = floors.raised(fmspc, floor)
        if floors is not self._state.floors:
            self._keep(self._state.model_copy(update={"floors": floors}))

    def _load(self) -> _State:
        fresh = _State(network_id=self.trust.network_id)
        if self._path is None or not self._path.exists():
            return fresh
        try:
            data = self._path.read_bytes()
            if len(data) > _MAX_STATE_BYTES:
                raise ValueError("too large")
            state = _State.model_validate_json(data)
        except (OSError, ValidationError, ValueError):
            raise ConfigurationError(
                f"{self._path} cannot be read; it keeps old collateral from being replayed. "
                "Remove it only if you know why it is damaged."
            ) from None
        return state if state.network_id == fresh.network_id else fresh

    def _keep(self, state: _State) -> None:
        self._state = state
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.replace(self._path, state.model_dump_json().encode())


def _summary(
    evidence: ProviderEvidence, verdict: Verdict, now_ms: int
) -> tuple[Attested | Refused, int]:
    """What to remember of a verdict, and until when (Unix ms)."""
    claims, evidence_id, assurance = verdict.claims, verdict.evidence_id, verdict.assurance
    until_ms = verdict.valid_until_ms
    if (
        not verdict.ok
        or claims is None
        or evidence_id is None
        or assurance is None
        or until_ms is None
    ):
        memory_ms = ERROR_MEMORY_MS if verdict.outcome is Outcome.ERROR else REJECT_MEMORY_MS
        return Refused(evidence.provider_id, verdict.code, verdict.sentence), now_ms + memory_ms
    attested = Attested(
        provider_id=evidence.provider_id,
        evidence_id=evidence_id,
        signing_key=claims.ed25519_public,
        models=frozenset(evidence.models),
        assurance=assurance,
        valid_until_ms=until_ms,
    )
    return attested, until_ms
