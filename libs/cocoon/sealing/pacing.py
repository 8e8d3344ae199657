"""When sealed records may leave: one pure scheduler for the four padding profiles.

Time is an argument; nothing here sleeps, seals or holds content. The caller keeps the text
that waits and the sealed bytes, and does what `Step` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cocoon.sealing.padding import Profile

TICK_MS: Final = 100
TICKS_PER_END: Final = 16  # P1 ends only on multiples of this
COALESCE_TOKENS: Final = 8
COALESCE_MS: Final = 100
TICK_FRAME_BYTES: Final = 4 + 256 + 17  # one P1 frame on the wire


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now.

    seal: make one object of all text that waits and seal it.
    pad: seal one pad record (only when nothing else is there to send).
    send_bytes: how many sealed bytes may leave now; None means all of them.
    finish: nothing waits and the receipt may be sealed and sent.
    wake_ms: ask again at this time at the latest; None means when something arrives.
    wake_tokens: before that time, ask only when so many tokens wait or the end is there.
    """

    seal: bool = False
    pad: bool = False
    send_bytes: int | None = 0
    finish: bool = False
    wake_ms: int | None = None
    wake_tokens: int = 1


NEVER: Final = 1 << 62  # tokens: only the end, or the time, wakes
_SILENT: Final = Step(wake_tokens=NEVER)
_IDLE: Final = Step()
_FINISH: Final = Step(send_bytes=None, finish=True)
_SEAL_ALL: Final = Step(seal=True, send_bytes=None)


class Pace:
    """The state of one response: when it opened, its last flush, its ticks."""

    __slots__ = ("_flushed", "_last_ms", "_profile", "_ticks")

    def __init__(self, profile: Profile, *, opened_ms: int) -> None:
        self._profile = profile
        self._last_ms = opened_ms
        self._flushed = False
        self._ticks = 0

    def step(
        self,
        now_ms: int,
        *,
        tokens_waiting: int,
        bytes_waiting: int,
        sealed_bytes: int,
        ended: bool,
    ) -> Step:
        """Decide for `now_ms` (Unix or monotonic milliseconds, never going back).

        tokens_waiting and bytes_waiting: text not yet sealed. sealed_bytes: frames sealed and
        not yet sent. ended: the engine has nothing more to say, usage included.
        """
        waiting = tokens_waiting > 0 or bytes_waiting > 0
        if self._profile is Profile.P1:
            return self._tick(now_ms, waiting=waiting, sealed_bytes=sealed_bytes, ended=ended)
        if self._profile is Profile.P0 and not ended:
            return _SILENT
        if ended:
            return _SEAL_ALL if waiting else _FINISH
        if not waiting:
            return Step(send_bytes=None) if sealed_bytes else _IDLE
        if self._profile is Profile.P2:
            due_ms = self._last_ms + COALESCE_MS
            if self._flushed and tokens_waiting < COALESCE_TOKENS and now_ms < due_ms:
                return Step(wake_ms=due_ms, wake_tokens=COALESCE_TOKENS)
            self._flushed, self._last_ms = True, now_ms
        return _SEAL_ALL

    def _tick(self, now_ms: int, *, waiting: bool, sealed_bytes: int, ended: bool) -> Step:
        """P1: one frame each 100 ms, whatever there is to say. A late caller catches up."""
        due_ms = self._last_ms + TICK_MS
        if ended and not waiting and not sealed_bytes and self._at_an_end():
            return _FINISH
        if now_ms < due_ms:
            return Step(wake_ms=due_ms, wake_tokens=NEVER)
        self._last_ms = due_ms
        self._ticks += 1
        queued = sealed_bytes > 0
        return Step(
            seal=waiting and not queued,
            pad=not waiting and not queued,
            send_bytes=TICK_FRAME_BYTES,
            wake_ms=due_ms + TICK_MS,
            wake_tokens=NEVER,
        )

    def _at_an_end(self) -> bool:
        return self._ticks > 0 and self._ticks % TICKS_PER_END == 0
