"""The prices of a model, and those before them that matches may still cite."""

from __future__ import annotations

from typing import Final

Prices = tuple[int, int, int]  # input, cached input, output; nanoTON per million tokens
MAX_OLD_PRICES: Final = 16


class PriceBook:
    """What a match may cite. An old price ends a while after the network has heard of the new."""

    def __init__(self, current: Prices) -> None:
        self.current = current
        self._old: dict[Prices, float | None] = {}  # until when; None: the network knows no other

    def change(self, prices: Prices) -> None:
        if prices == self.current:
            return
        self._old[self.current] = None
        self._old.pop(prices, None)
        self.current = prices
        if len(self._old) > MAX_OLD_PRICES:
            del self._old[next(iter(self._old))]

    def published(self, prices: Prices, until_s: float) -> None:
        """The network matches at `prices` from now on: older ones end at `until_s`."""
        for old, ends_s in self._old.items():
            if old != prices and ends_s is None:
                self._old[old] = until_s

    def takes(self, prices: Prices, now_s: float) -> bool:
        if prices == self.current:
            return True
        if prices not in self._old:
            return False
        until_s = self._old[prices]
        return until_s is None or now_s < until_s
