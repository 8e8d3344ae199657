"""HPKE (RFC 9180) in base mode, export only: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, 0xFFFF.

Only what CAI/1 needs, on libsodium's X25519 and the standard library's HMAC. It never draws
randomness: the ephemeral secret is an argument, and must be used once.
"""

from __future__ import annotations

import hmac
from typing import Final

from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import RuntimeError as SodiumError

from cocoon.sealing.refusals import refuse

KEY_BYTES: Final = 32
_KEM_SUITE: Final = b"KEM\x00\x20"
_SUITE: Final = b"HPKE\x00\x20\x00\x01\xff\xff"
_VERSION: Final = b"HPKE-v1"
_MODE_BASE: Final = b"\x00"
_MAX_EXPORT_BYTES: Final = 255 * 32


def hkdf_extract(salt: bytes, ikm: bytes) -> bytes:
    """HKDF-SHA256 extract (RFC 5869): 32 bytes."""
    return hmac.digest(salt, ikm, "sha256")


def hkdf_expand(prk: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 expand (RFC 5869). Raises ValueError above 8,160 bytes."""
    if not 0 < size <= _MAX_EXPORT_BYTES:
        raise ValueError("HKDF-SHA256 gives 1 to 8,160 bytes")
    block = hmac.digest(prk, info + b"\x01", "sha256")
    if size <= 32:
        return block[:size]
    output = block
    for index in range(2, -(-size // 32) + 1):
        block = hmac.digest(prk, block + info + bytes((index,)), "sha256")
        output += block
    return output[:size]


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hkdf_extract(salt, _VERSION + suite + label + ikm)


def _labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, size: int) -> bytes:
    return hkdf_expand(prk, size.to_bytes(2, "big") + _VERSION + suite + label + info, size)


# The key schedule's context starts with the mode and the hash of the (empty) PSK id.
_CONTEXT_PREFIX: Final = _MODE_BASE + _labeled_extract(_SUITE, b"", b"psk_id_hash", b"")


def public_key(secret_key: bytes) -> bytes:
    """Return the X25519 public key of 32 secret bytes. Raises SealingError(bad_key)."""
    if len(secret_key) != KEY_BYTES:
        refuse("bad_key", "An X25519 secret key is 32 bytes.")
    return crypto_scalarmult_base(secret_key)


def x25519(secret_key: bytes, peer_public_key: bytes) -> bytes:
    """Return the shared point. Raises SealingError(bad_key) for a low-order point (all zeros)."""
    # libsodium's binding reads 32 bytes whatever it is given, so lengths are checked here
    if len(secret_key) != KEY_BYTES or len(peer_public_key) != KEY_BYTES:
        refuse("bad_key", "An X25519 key is 32 bytes.")
    try:
        return crypto_scalarmult(secret_key, peer_public_key)
    except SodiumError:
        refuse("bad_key", "The X25519 key is a low-order point; take a fresh key from its owner.")


class ExportContext:
    """What both sides hold after the KEM: a source of keys, one per label. It hides its secret."""

    __slots__ = ("_exporter_secret",)

    def __init__(self, exporter_secret: bytes) -> None:
        self._exporter_secret = exporter_secret

    def __repr__(self) -> str:
        return "ExportContext(<secret>)"

    def __reduce__(self) -> str:
        raise TypeError("an HPKE context is not serialised")

    def export(self, label: bytes, size: int) -> bytes:
        """RFC 9180 section 5.3: `size` bytes bound to `label`."""
        return _labeled_expand(_SUITE, self._exporter_secret, b"sec", label, size)


def _schedule(dh: bytes, enc: bytes, recipient_pk: bytes, info: bytes) -> ExportContext:
    eae_prk = _labeled_extract(_KEM_SUITE, b"", b"eae_prk", dh)
    shared = _labeled_expand(_KEM_SUITE, eae_prk, b"shared_secret", enc + recipient_pk, 32)
    context = _CONTEXT_PREFIX + _labeled_extract(_SUITE, b"", b"info_hash", info)
    secret = _labeled_extract(_SUITE, shared, b"secret", b"")
    return ExportContext(_labeled_expand(_SUITE, secret, b"exp", context, 32))


def setup_sender(recipient_pk: bytes, info: bytes, *, eph_sk: bytes) -> tuple[bytes, ExportContext]:
    """SetupBaseS: return (enc, context). `eph_sk` is 32 fresh random bytes, used once."""
    enc = public_key(eph_sk)
    return enc, _schedule(x25519(eph_sk, recipient_pk), enc, recipient_pk, info)


def setup_receiver(
    enc: bytes, secret_key: bytes, info: bytes, *, own_pk: bytes | None = None
) -> ExportContext:
    """SetupBaseR. `own_pk`, where the caller keeps it, saves one multiplication."""
    pk = public_key(secret_key) if own_pk is None else own_pk
    return _schedule(x25519(secret_key, enc), enc, pk, info)
