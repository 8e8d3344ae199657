"""What a model has done since the start, and its tokens a second over the last minute."""

from __future__ import annotations

from typing import Final

from cocoon.kernel.clock import Clock

WINDOW_S: Final = 60


class Tally:
    """Jobs with a receipt, whatever it says, and the tokens that they were billed for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._seconds = [(-1, 0)] * WINDOW_S  # (which second, output tokens in it)
        self.jobs = 0
        self.input_tokens = 0
        self.output_tokens = 0

    def count(self, input_tokens: int, output_tokens: int) -> None:
        self.jobs += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        second = int(self._clock.monotonic_s())
        at, made = self._seconds[second % WINDOW_S]
        self._seconds[second % WINDOW_S] = (second, output_tokens + (made if at == second else 0))

    def tokens_per_s(self) -> float:
        """Output tokens of the answers that ended in the last minute, a second."""
        now_s = self._clock.monotonic_s()
        since = int(now_s) - WINDOW_S
        made = sum(tokens for second, tokens in self._seconds if second > since)
        return made / min(WINDOW_S, max(1.0, now_s - self._began_s))
