"""How fast things may happen: token buckets for all and for each, bounded. Pure."""

from __future__ import annotations

from collections import OrderedDict


class Bucket:
    """`burst` at once, and `per_s` again every second."""

    __slots__ = ("_burst", "_left", "_per_s", "_seen_s")

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._seen_s = float(burst), 0.0

    def take(self, now_s: float) -> bool:
        """Whether one more may happen now (monotonic seconds)."""
        self._left = min(self._burst, self._left + (now_s - self._seen_s) * self._per_s)
        self._seen_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Buckets:
    """A bucket for each name; the `limit` that were used last are remembered."""

    def __init__(self, per_s: float, burst: int, limit: int) -> None:
        self._per_s, self._burst, self._limit = per_s, burst, limit
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, now_s: float) -> bool:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(self._per_s, self._burst)
            if len(self._buckets) > self._limit:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket.take(now_s)
