"""Mutates JSON as JSON half the time: a value replaced, dropped, repeated or wrapped, so that many
inputs pass the JSON parser and meet the rules behind it. Otherwise bytes are mutated as bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

ODD_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**53 + 1, 2**63, 10**400, 0.5, -0.0, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "0", "-1", "00", "a" * 300, "0" * 32, "f" * 64,
    "\ud800", "né", "\0", "a.b\n", [], {}, [[]], [None], {"": {}}, "9" * 20,
)  # fmt: skip
Mutator = Callable[[bytes, int, int], bytes]


def mutator(mutate_bytes: Callable[[bytes, int], bytes], separator: bytes | None) -> Mutator:
    """libFuzzer's custom mutator (data, max_size, seed) over JSON texts joined by `separator`."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)  # noqa: S311 - mutations, not secrets
        texts = data.split(separator) if separator else [data]
        at = dice.randrange(len(texts))
        try:
            value = json.loads(texts[at])
        except (ValueError, RecursionError):
            return mutate_bytes(data, max_size)
        if dice.random() < 0.5:
            return mutate_bytes(data, max_size)
        for _ in range(dice.choice((1, 1, 2, 4))):
            value = _changed(value, dice)
        texts[at] = json.dumps(value, separators=(",", ":")).encode()
        changed = (separator or b"").join(texts)
        return changed if len(changed) <= max_size else mutate_bytes(data, max_size)

    return mutate


def _changed(value: Any, dice: random.Random) -> Any:
    """The value with one place changed, chosen by walking down at random."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.15:
        return dice.choice((*ODD_VALUES, [value], {"a": value}, [value, value]))
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = dice.choice(keys)
    copy = value.copy()
    what = dice.random()
    if what < 0.1:
        del copy[key]
    elif what < 0.2:
        other = copy[dice.choice(keys)]
        if isinstance(copy, dict):
            copy[dice.choice(("x", "", "\ud800", "type", str(key) + "x"))] = other
        else:
            copy.insert(key, other)
    else:
        copy[key] = _changed(copy[key], dice)
    return copy
