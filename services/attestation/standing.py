"""How the network sees one provider, told to itself: what it lacks, what was refused it, and why.

The last refusal of each is kept in memory, of the latest providers; what was revoked is in the log.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import AttestationRevoked, ProviderAttested
from cocoon.domain.provider import ProviderState
from cocoon.kernel.errors import CocoonError

MAX_REMEMBERED: Final = 4096
T = TypeVar("T")


@dataclass(slots=True)
class Standings:
    """Bounded: the providers that were refused, or revoked, last."""

    _refusals: OrderedDict[str, dict[str, object]] = field(default_factory=OrderedDict)
    _revoked: OrderedDict[str, dict[str, object]] = field(default_factory=OrderedDict)
    _seen: OrderedDict[str, int] = field(default_factory=OrderedDict)  # stream -> version

    def apply(self, stored: StoredEvent) -> None:
        """Learn of an event of shard 0; seen again it changes nothing."""
        if stored.type not in (AttestationRevoked.event_type, ProviderAttested.event_type):
            return
        if stored.version <= self._seen.get(stored.stream, 0):
            return  # our own, which the tail brings again
        _keep(self._seen, stored.stream, stored.version)
        if stored.type == AttestationRevoked.event_type:
            event = stored.decode()
            assert isinstance(event, AttestationRevoked)  # noqa: S101 - by its type
            _keep(
                self._revoked, event.provider_id,
                {"reason": event.reason, "at_ms": stored.recorded_at_us // 1000},
            )  # fmt: skip
        else:
            self._revoked.pop(stored.stream.partition("/")[2], None)

    def refused(self, provider_id: str, verb: str, error: CocoonError, now_ms: int) -> None:
        """Remember what a provider was told last."""
        said = {"verb": verb, "code": error.code, "message": error.message[:300], "at_ms": now_ms}
        _keep(self._refusals, provider_id, said)

    def tell(
        self, provider_id: str, state: ProviderState | None, *, listed: bool, banned: bool,
        now_ms: int,
    ) -> dict[str, object]:  # fmt: skip
        """The whole standing, as JSON takes it."""
        attested = state.attested if state else None
        enrolled = state.enrolled if state else None
        live = [b for b in state.bundles if b.not_after_ms > now_ms] if state else []
        return {
            "provider_id": provider_id,
            "enrolled": enrolled is not None,
            "tier": attested.assurance if attested else enrolled.tier if enrolled else None,
            "attested": attested is not None,
            "evidence_valid_until_ms": attested.valid_until_ms if attested else None,
            "verdict": attested.verdict if attested else None,
            "key_valid_until_ms": max((b.not_after_ms for b in live), default=None),
            "offered_models": len(state.offer.models) if state and state.offer else 0,
            "listed": listed,
            "banned": banned,
            "revoked": self._revoked.get(provider_id),
            "last_refusal": self._refusals.get(provider_id),
        }


def _keep(into: OrderedDict[str, T], name: str, what: T) -> None:
    into[name] = what
    into.move_to_end(name)
    while len(into) > MAX_REMEMBERED:
        into.popitem(last=False)
