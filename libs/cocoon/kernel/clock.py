"""Time and randomness are arguments. Production passes these two; tests pass their own."""

from __future__ import annotations

import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """What a shell may ask of time. Pure code takes `now_ms` instead."""

    def now_ms(self) -> int:
        """Unix time in milliseconds."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps back."""


class SystemClock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()


class Randomness(Protocol):
    def token(self, size: int) -> bytes:
        """`size` unpredictable bytes."""


class SystemRandomness:
    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)
