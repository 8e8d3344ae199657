"""When a job at the gateway has something due: asking the matcher again, the log, or giving up.

Monotonic milliseconds come in as arguments; it reads no clock and decides no action.
"""

from __future__ import annotations

from typing import Final

from services.gateway.actions import Timing

MAX_LOOKUP_PAUSE_MS: Final = 16_000


class Waits:
    """One job's deadlines. `attached`: it follows another's run, and only the log tells of it."""

    __slots__ = (
        "_asked_again", "_attached", "_lookup_at", "_lookup_pause", "_match_by", "_queued",
        "_repeat_at", "_timing", "first_byte_at", "job_ends_at",
    )  # fmt: skip

    def __init__(self, timing: Timing, attached: bool, not_after_in_ms: int, now_ms: int) -> None:
        self._timing, self._attached = timing, attached
        self._asked_again = False
        self._queued = False  # the matcher has the request in its queue
        self._repeat_at = now_ms + timing.repeat_ask_ms
        self._match_by = now_ms + timing.match_timeout_ms
        self.first_byte_at = now_ms + min(timing.first_byte_ms, not_after_in_ms)
        self.job_ends_at = now_ms + timing.job_ms
        self.on_progress(now_ms)

    def wake_at_ms(self, *, asking: bool, silent: bool) -> int:
        """The next deadline. `asking`: no match yet; `silent`: no byte has come yet."""
        if asking:
            due = self._match_by if self._asked_again else self._repeat_at
        else:
            due = self._lookup_at
        if silent:
            due = min(due, self.first_byte_at)
        return min(due, self.job_ends_at)

    def on_progress(self, now_ms: int) -> None:
        """Something came: the log need not be asked for a while."""
        timing = self._timing
        self._lookup_pause = timing.attached_lookup_ms if self._attached else timing.stall_ms
        self._lookup_at = now_ms + self._lookup_pause

    def on_attached(self) -> None:
        """From now on only the log tells."""
        self._attached = True
        self._lookup_pause = self._timing.attached_lookup_ms

    def on_queued(self, now_ms: int) -> None:
        """The matcher queues the request until a provider is free."""
        self._queued, self._asked_again = True, False
        self._repeat_at = now_ms + self._timing.waiting_repeat_ms

    def ask_due(self, now_ms: int) -> bool:
        """Whether the matcher is to be asked again now: once, or for a queued job each time."""
        if now_ms < self._repeat_at or self._asked_again:
            return False
        if self._queued:
            self._match_by = now_ms + self._timing.match_timeout_ms
        elif now_ms >= self._match_by:
            return False
        self._queued, self._asked_again = False, True
        return True

    def matcher_is_silent(self, now_ms: int) -> bool:
        """Whether the matcher has had its time."""
        return not self._queued and now_ms >= self._match_by

    def lookup_due(self, now_ms: int) -> bool:
        """Whether the log is to be asked now; the pause doubles up to 16 s."""
        if now_ms < self._lookup_at:
            return False
        self._lookup_pause = min(self._lookup_pause * 2, MAX_LOOKUP_PAUSE_MS)
        self._lookup_at = now_ms + self._lookup_pause
        return True
