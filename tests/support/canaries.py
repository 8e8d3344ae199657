"""Looking for plaintext where none may be: canaries in files, in every coat that they may wear."""

from __future__ import annotations

import base64
import contextlib
import gzip
from collections.abc import Iterable
from pathlib import Path


def find_canaries(places: Iterable[tuple[str, bytes]], canaries: Iterable[bytes]) -> list[str]:
    """Names of the places that hold a canary: plain, hex, base64, UTF-16 or gzipped."""
    needles = [form for canary in canaries for form in _forms(canary)]
    found = []
    for name, data in places:
        if data[:2] == b"\x1f\x8b":
            with contextlib.suppress(OSError, EOFError):
                data = gzip.decompress(data)  # noqa: PLW2901
        if any(needle in data for needle in needles):
            found.append(name)
    return found


def files_under(*folders: Path) -> Iterable[tuple[str, bytes]]:
    """(path, bytes) of every file below the folders that does not vanish meanwhile."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    yield str(path), path.read_bytes()


def _forms(canary: bytes) -> list[bytes]:
    if len(canary) < 12:
        raise ValueError("a canary shorter than 12 bytes may be found by chance")
    forms = [canary, canary.hex().encode(), canary.hex().upper().encode()]
    forms.append(canary.decode().encode("utf-16-le"))
    for shift in range(3):
        # Wherever it starts within a group of three bytes, these characters are the same.
        text = base64.b64encode(bytes(shift) + canary)
        inner = text[-(-shift * 8 // 6) : (shift + len(canary)) // 3 * 4]
        forms += [inner, inner.replace(b"+", b"-").replace(b"/", b"_")]
    return forms
