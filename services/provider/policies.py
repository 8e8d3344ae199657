"""The policy hashes that this enclave takes: the current one and, for an hour, the one before.

The signed document lies in a file beside the trust file that names its signers; a change of the
file is taken over without a restart. A document that does not verify changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cocoon.evidence import policy as rules
from cocoon.evidence.trust import TrustAnchors
from cocoon.kernel.errors import ConfigurationError

GRACE_MS: Final = 3_600_000


class PolicyWatch:
    """Reads the file when it changed; `hashes` is what requests may name."""

    def __init__(self, path: Path, trust: TrustAnchors) -> None:
        self._path = path
        self._trust = trust
        self._stamp: tuple[int, int] | None = None
        self._current: bytes | None = None
        self._models: frozenset[str] | None = None  # None: the policy allows any
        self._version = 0
        self._previous: tuple[bytes, int] | None = None  # hash, until

    def refresh(self, now_ms: int) -> None:
        """Look at the file. Raises ConfigurationError if it cannot be used (the old one stays)."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return
            signed = rules.parse_policy(self._path.read_bytes())
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{self._path} is not a signed policy; fetch the network's again"
            ) from None
        policy = signed.policy
        signers, threshold = self._trust.policy_signers, self._trust.policy_threshold
        if not rules.verify(signed, signers, threshold):
            raise ConfigurationError(
                f"{self._path} is not signed by the keys that the trust file names"
            )
        if policy.network_id != self._trust.network_id:
            raise ConfigurationError(f"{self._path} is the policy of another network")
        if policy.version < self._version:
            raise ConfigurationError(f"{self._path} is older than the policy in use")
        fresh = rules.policy_hash(policy)
        if self._current is not None and fresh != self._current:
            self._previous = (self._current, now_ms + GRACE_MS)
        self._current, self._version, self._stamp = fresh, policy.version, stamp
        self._models = None if policy.models is None else frozenset(policy.models)

    def allows(self, model_id: str) -> bool:
        """Whether evidence that names the model would be taken under the current policy."""
        return self._models is None or model_id in self._models

    def hashes(self, now_ms: int) -> frozenset[bytes]:
        """Empty before the first refresh: nothing is taken then."""
        taken = {self._current} if self._current is not None else set()
        if self._previous is not None and now_ms < self._previous[1]:
            taken.add(self._previous[0])
        return frozenset(taken)
