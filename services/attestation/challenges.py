"""Challenges that wait for their evidence: one a provider, single use, minutes, bounded. Pure."""

from __future__ import annotations

from collections import OrderedDict

from cocoon.contracts.messages import Challenge
from cocoon.evidence import claims
from cocoon.evidence.provider import ProviderEvidence
from cocoon.evidence.verdict import reject
from cocoon.kernel.errors import EvidenceRejected

RETRY_AFTER_S = 1


class Challenges:
    """At most `limit` outstanding; the oldest gives way, and its provider asks again."""

    def __init__(self, limit: int, ttl_ms: int) -> None:
        self._limit, self._ttl_ms = limit, ttl_ms
        self._waiting: OrderedDict[str, Challenge] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def issue(self, provider_id: str, log_head: bytes, random: bytes, now_ms: int) -> Challenge:
        """A new challenge over the log's head hash; an earlier one of this provider is void."""
        issued = Challenge(
            challenge=claims.challenge(log_head, provider_id, random).hex(),
            checkpoint_root=log_head.hex(),
            challenge_random=random.hex(),
            expires_ms=now_ms + self._ttl_ms,
        )
        self._waiting.pop(provider_id, None)
        self._waiting[provider_id] = issued
        while len(self._waiting) > self._limit:
            self._waiting.popitem(last=False)
        return issued

    def spend(self, evidence: ProviderEvidence, now_ms: int) -> None:
        """Use up the challenge that this evidence answers. Raises EvidenceRejected (nonce).

        That the quote covers it is the verifier's part.
        """
        issued = self._waiting.pop(evidence.provider_id, None)
        if (
            issued is None
            or now_ms >= issued.expires_ms
            or evidence.checkpoint_root != issued.checkpoint_root
            or evidence.challenge_random != issued.challenge_random
        ):
            verdict = reject("nonce", "It was used before, has run out, or was never given.")
            raise EvidenceRejected(
                f"{verdict.sentence} {verdict.next_step}",
                code=verdict.code,
                retry_after_s=RETRY_AFTER_S,
            )
