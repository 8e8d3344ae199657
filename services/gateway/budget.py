"""Bytes in memory: one bound for the gateway and one for each key, whatever the bytes are for.

Request bodies, frames that wait, whole answers and stored responses on their way out all count.
Counters only: it holds no bytes, waits for nothing and knows no clock.
"""

from __future__ import annotations

from typing import Final

from cocoon.kernel.errors import RateLimited

RETRY_AFTER_S: Final = 1


class _Key:
    """What one key's requests hold together."""

    __slots__ = ("shares", "used_bytes")

    def __init__(self) -> None:
        self.used_bytes = 0
        self.shares = 0


class ByteBudget:
    """The bounds. `share` opens one request's account; nothing is taken outside of one."""

    def __init__(self, total_bytes: int, per_key_bytes: int) -> None:
        self.total_bytes, self.per_key_bytes = total_bytes, per_key_bytes
        self.used_bytes = 0
        self._keys: dict[str, _Key] = {}

    @property
    def keys(self) -> int:
        """How many keys have an open share."""
        return len(self._keys)

    def share(self, api_key_id: str) -> Share:
        """Open a share for a request of this key; `give_back` closes it."""
        key = self._keys.setdefault(api_key_id, _Key())
        key.shares += 1
        return Share(self, api_key_id, key)

    def _closed(self, api_key_id: str, key: _Key) -> None:
        key.shares -= 1
        if not key.shares:
            del self._keys[api_key_id]


class Share:
    """What one request holds. Every way out of the request ends with `give_back`."""

    __slots__ = ("_api_key_id", "_budget", "_key", "_open", "used_bytes")

    def __init__(self, budget: ByteBudget, api_key_id: str, key: _Key) -> None:
        self._budget, self._api_key_id, self._key = budget, api_key_id, key
        self._open = True
        self.used_bytes = 0

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes could be taken now."""
        budget = self._budget
        return (
            self._open
            and budget.used_bytes + size <= budget.total_bytes
            and self._key.used_bytes + size <= budget.per_key_bytes
        )

    def take(self, size: int) -> bool:
        """Count `size` more bytes, unless a bound would be passed."""
        if not self.fits(size):
            return False
        self._add(size)
        return True

    def check(self, size: int) -> None:
        """Raise RateLimited unless `size` more bytes fit now; count nothing."""
        if self.fits(size):
            return
        if self._key.used_bytes + size > self._budget.per_key_bytes:
            raise RateLimited(
                "this API key's open requests hold as many bytes as one key may; let one of them "
                "end, or read its answer faster",
                code="too_many_bytes",
                retry_after_s=RETRY_AFTER_S,
            )
        raise RateLimited(
            "the gateway holds as many sealed bytes as it may; try again in a second",
            code="gateway_full",
            retry_after_s=RETRY_AFTER_S,
        )

    def need(self, size: int) -> None:
        """Count `size` more bytes. Raises RateLimited."""
        self.check(size)
        self._add(size)

    def keep(self, size: int) -> None:
        """Give back all but `size` bytes; it never takes any."""
        if size < self.used_bytes:
            self._add(size - self.used_bytes)

    def give_back(self) -> None:
        """Give everything back and close the share; again does nothing."""
        if self._open:
            self.keep(0)
            self._open = False
            self._budget._closed(self._api_key_id, self._key)

    def _add(self, size: int) -> None:
        self.used_bytes += size
        self._key.used_bytes += size
        self._budget.used_bytes += size
