"""How this agent stands with the network, as it has heard: for `GET /status`."""

from __future__ import annotations

from typing import Any, Final

from cocoon.agent import dropped
from cocoon.kernel.errors import EvidenceRejected, Rejected
from cocoon.telemetry.logs import get_logger

_log = get_logger("cocoon.provider.standing")
_REVOKED: Final = ("not_attested", *dropped.BARRED)


class Standing:
    """The last word on evidence, the last refusal, and whether the evidence was taken back.

    `barred`: new evidence is refused until an operator or a policy changes that.
    """

    def __init__(self) -> None:
        self.tier = ""
        self.barred = False
        self.proved = 0  # how often evidence was taken
        self._valid_until_ms: int | None = None
        self._last_refusal: dict[str, Any] | None = None
        self._revoked: dict[str, Any] | None = None

    @property
    def revoked(self) -> bool:
        return self._revoked is not None

    def attested(self, valid_until_ms: int, tier: str) -> None:
        self._valid_until_ms = valid_until_ms
        self.tier = tier or self.tier
        self.proved += 1
        self.stands()

    def stands(self) -> None:
        """The network says that the evidence stands."""
        self._revoked = None
        self.barred = False

    def refused(self, error: Rejected, now_ms: int) -> None:
        """What the network will not take, and whether that says that it took its word back."""
        self._last_refusal = {"code": error.code, "message": error.message, "at_ms": now_ms}
        self.barred = self.barred or error.code in dropped.BARRED
        if error.code in _REVOKED:
            self.dropped(error.code, now_ms)

    def dropped(self, reason: str, at_ms: int) -> bool:
        """The network took its word back, for a reason that is logged once. Whether it is news."""
        if self._revoked is not None and not _says_more(reason, self._revoked["reason"]):
            return False
        said = dropped.sentence(reason)
        self._revoked = {"reason": reason, "at_ms": at_ms, "message": said}
        _log.warning("dropped_by_network", exc_info=EvidenceRejected(said, code=reason))
        return True

    def told(self, now_ms: int) -> dict[str, Any]:
        until_ms = self._valid_until_ms
        return {
            "evidence_valid_until_ms": until_ms,
            "attested": self._revoked is None and until_ms is not None and now_ms < until_ms,
            "last_refusal": self._last_refusal,
            "revoked": self._revoked,
        }


def _says_more(reason: str, known: str) -> bool:
    """Whether another reason says more than the known one: a canary's verdict is a ban as well."""
    return reason not in (known, "not_attested") and (known, reason) != ("canary", "banned")
