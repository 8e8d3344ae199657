"""CAI/1's labels and key derivations, in one place, so that both sides cannot differ.

Pure. Nothing here is kept, logged or compared in variable time.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cocoon.sealing.hpke import hkdf_expand, hkdf_extract

INFO_PREFIX: Final = b"cai/1 request\x00"
WRAP_LABEL: Final = b"cai/1 wrap"
RESPONSE_LABEL: Final = b"cai/1 response"
PROMPT_LABEL: Final = b"prompt\x00"
OUTPUT_LABEL: Final = b"output\x00"
_KEY_ID_PREFIX: Final = b"cai/1 key id\x00"


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def key_id(x25519_pk: bytes) -> bytes:
    """The 16-byte public name of an enclave's X25519 key."""
    return sha256(_KEY_ID_PREFIX + x25519_pk)[:16]


def hpke_info(fixed: bytes) -> bytes:
    """HPKE's info: the header's fixed part, so that no field of it can be changed."""
    return INFO_PREFIX + fixed


def request_keys(header_hash: bytes, cek: bytes) -> tuple[bytes, bytes]:
    """Return (request stream key, commit key), both bound to the whole header."""
    prk = hkdf_extract(header_hash, cek)
    return hkdf_expand(prk, b"cai/1 request stream", 32), hkdf_expand(prk, b"cai/1 commit", 32)


def response_key(prefix_hash: bytes, response_export: bytes, ephemeral_dh: bytes) -> bytes:
    """The response stream's key: needs the job's HPKE export and both ephemeral keys' point."""
    prk = hkdf_extract(prefix_hash, response_export + ephemeral_dh)
    return hkdf_expand(prk, b"cai/1 response stream", 32)


def new_commit(commit_key: bytes, label: bytes) -> hmac.HMAC:
    """A running commitment: HMAC-SHA256(commit key, label || ...). Feed it, then `.digest()`."""
    return hmac.new(commit_key, label, "sha256")


def commit(commit_key: bytes, label: bytes, content: bytes) -> bytes:
    """commit(label, x). Keyed: a bare hash of a short prompt could be guessed."""
    return hmac.digest(commit_key, label + content, "sha256")
