"""Canonical JSON: the one byte form that is hashed, signed and stored.

Sorted keys, no spaces, UTF-8, no floats, no duplicate keys, integers within 2**53 (larger
amounts travel as decimal strings). The subset of RFC 8785 that needs no number formatting.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import msgspec

_MAX_SAFE_INT = 2**53


def _check(value: object) -> None:
    kind = type(value)  # exact types: the encoder knows no others; it refuses lone surrogates
    if kind is int:
        if not -_MAX_SAFE_INT <= value <= _MAX_SAFE_INT:  # type: ignore[operator]
            raise ValueError("canonical JSON holds integers up to 2**53; use a decimal string")
    elif kind is dict:
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str or not key.isascii():
                # ASCII keys sort alike by bytes, code points and UTF-16 units
                raise ValueError("canonical JSON keys are ASCII strings")
            if type(item) is not str:
                _check(item)
    elif kind is list or kind is tuple:
        for item in value:  # type: ignore[attr-defined]
            if type(item) is not str:
                _check(item)
    elif value is not None and kind is not bool and kind is not str:
        raise ValueError(f"canonical JSON cannot hold {kind.__name__}")


def dumps(value: object) -> bytes:
    """Return the canonical bytes. Raises ValueError for floats, big integers or odd keys."""
    try:
        _check(value)
        return msgspec.json.encode(value, order="sorted")
    except RecursionError:
        raise ValueError("canonical JSON is nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("canonical JSON has no duplicate keys")
    return result


def loads(data: bytes, *, strict: bool = True) -> Any:
    """Parse JSON. With `strict`, refuse bytes that are not the canonical form of their value."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("canonical JSON is nested too deeply") from None
    if strict and dumps(value) != data:
        raise ValueError("the bytes are not canonical JSON")
    return value


def loads_object(data: bytes, *, strict: bool = True) -> dict[str, Any]:
    """Like `loads`, and refuse anything but an object."""
    value = loads(data, strict=strict)
    if not isinstance(value, dict):
        raise ValueError("a JSON object is expected")  # noqa: TRY004 - one error type for input
    return cast("dict[str, Any]", value)


def digest(value: object) -> bytes:
    """SHA-256 of the canonical bytes."""
    return hashlib.sha256(dumps(value)).digest()
