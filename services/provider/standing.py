"""How this agent stands with the network, as it has heard: for `GET /status`."""

from __future__ import annotations

from typing import Any, Final

from cocoon.kernel.errors import Rejected

_REVOKED: Final = ("not_attested", "banned")


class Standing:
    """The last word on evidence, the last refusal, and whether the evidence was taken back."""

    def __init__(self) -> None:
        self.tier = ""
        self._valid_until_ms: int | None = None
        self._last_refusal: dict[str, Any] | None = None
        self._revoked: dict[str, Any] | None = None

    def attested(self, valid_until_ms: int, tier: str) -> None:
        self._valid_until_ms = valid_until_ms
        self.tier = tier or self.tier
        self._revoked = None

    def refused(self, error: Rejected, now_ms: int) -> None:
        """What the network will not take, and whether that says that it took its word back."""
        self._last_refusal = {"code": error.code, "message": error.message, "at_ms": now_ms}
        if error.code in _REVOKED:
            self._revoked = {"reason": error.code, "at_ms": now_ms}

    def told(self, now_ms: int) -> dict[str, Any]:
        until_ms = self._valid_until_ms
        return {
            "evidence_valid_until_ms": until_ms,
            "attested": self._revoked is None and until_ms is not None and now_ms < until_ms,
            "last_refusal": self._last_refusal,
            "revoked": self._revoked,
        }
