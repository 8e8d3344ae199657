"""The codes of CAI/1: fine inside an enclave or a client, coarse to the outside.

A coarse answer gives an attacker no oracle. Messages say what to do and hold no payload.
"""

from __future__ import annotations

from typing import Final, NoReturn

from cocoon.kernel.errors import SealingError

INSIDE_CODES: Final = frozenset({
    "bad_magic", "bad_suite", "truncated", "bad_key", "unknown_key", "decrypt_failed",
    "wrong_model", "wrong_policy", "replay", "expired", "bad_request", "bad_padding", "bad_tag",
    "data_after_final", "record_too_large", "wrong_job", "no_receipt", "receipt_sig",
    "receipt_mismatch", "busy",
})  # fmt: skip

_OUTSIDE: Final = frozenset({"unknown_key", "wrong_policy", "expired", "busy"})


def refuse(code: str, message: str, *, param: str | None = None) -> NoReturn:
    """Raise SealingError with one of INSIDE_CODES."""
    raise SealingError(message, code=code, param=param)


def outside_code(code: str) -> str:
    """Return what an enclave may answer to the outside for an inside code."""
    return code if code in _OUTSIDE else "bad_request"
