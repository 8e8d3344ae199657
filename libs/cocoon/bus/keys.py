"""nkeys: the Ed25519 identities of NATS users, kept in files that only their owner reads.

A provider's nkey is its identity key. Seeds never appear on command lines or in logs.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

import nkeys
from nacl.signing import SigningKey

from cocoon.kernel.errors import ConfigurationError

USER, ACCOUNT, SERVER = nkeys.PREFIX_BYTE_USER, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_SERVER
_NKEY_CHARS = 56  # of a kind byte, 32 bytes and a checksum of 2, in base32


def new_issuer_seed(raw: bytes) -> bytes:
    """Encode 32 random bytes as an account's seed ("SA...")."""
    seed: bytes = nkeys.encode_seed(raw, ACCOUNT)
    return seed.rstrip(b"=")


def nkey(kind: int, raw: bytes) -> str:
    """The public name of a 32-byte Ed25519 key: "U..." for a user, "A..." for an account."""
    body = bytes([kind]) + raw
    return base64.b32encode(body + _checksum(body)).decode().rstrip("=")


def raw_of_nkey(kind: int, text: str) -> bytes:
    """The 32-byte key behind a public name of this kind. Raises ValueError for anything else."""
    if len(text) != _NKEY_CHARS or not text.isascii():
        raise ValueError("an nkey has 56 characters")
    data = base64.b32decode(text)  # its error is a ValueError
    if data[0] != kind or data[33:] != _checksum(data[:33]):
        raise ValueError("not an nkey of this kind")
    return data[1:33]


def _checksum(body: bytes) -> bytes:
    """CRC-16/XMODEM, little-endian."""
    return binascii.crc_hqx(body, 0).to_bytes(2, "little")


def new_seed(raw: bytes) -> bytes:
    """Encode 32 random bytes as a user's seed ("SU...")."""
    seed: bytes = nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER)
    return seed.rstrip(b"=")


def raw_seed(seed: bytes) -> bytes:
    """The 32 bytes of an Ed25519 seed. Raises ConfigurationError if it is not a user's seed."""
    return _raw_seed(seed, USER, "this seed is not a user's; it starts with SU")


def raw_issuer_seed(seed: bytes) -> bytes:
    """The 32 bytes of the seed that signs who may come in. Raises ConfigurationError."""
    return _raw_seed(seed, ACCOUNT, "this seed is not an account's; it starts with SA")


def _raw_seed(seed: bytes, kind: int, otherwise: str) -> bytes:
    try:
        prefix, raw = nkeys.decode_seed(seed.strip())
    except nkeys.NkeysError:
        raise ConfigurationError("this file does not hold an nkey seed") from None
    if prefix != kind or len(raw) != 32:
        raise ConfigurationError(otherwise)
    return bytes(raw)


def raw_public(seed: bytes) -> bytes:
    """The 32-byte Ed25519 public key of a seed."""
    return bytes(SigningKey(raw_seed(seed)).verify_key)


def public_nkey(seed: bytes) -> str:
    """The public name of a user ("U...")."""
    public: bytes = nkeys.from_seed(bytearray(seed.strip())).public_key
    return public.decode()


def raw_of_public(nkey: str) -> bytes:
    """The 32-byte Ed25519 public key behind a user's public name ("U...")."""
    padded = nkey + "=" * (-len(nkey) % 8)
    return base64.b32decode(padded)[1:33]  # a kind byte before it, a checksum behind


def write_seed_file(path: Path, seed: bytes) -> None:
    """Write a seed to a new file of mode 0600. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(seed + b"\n")


def read_seed_file(path: Path) -> bytes:
    """Read a seed. Raises ConfigurationError if it is missing or others may read it."""
    try:
        mode = path.stat().st_mode
        seed = path.read_bytes().strip()
    except OSError:
        raise ConfigurationError(f"the seed file {path} cannot be read") from None
    if mode & 0o077:
        raise ConfigurationError(f"others may read the seed file {path}; chmod 600 it")
    return seed


def seed_file(path: Path, raw: bytes) -> bytes:
    """Return the seed in `path`, made from `raw` first if there is no such file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_seed_file(path, new_seed(raw))
    return read_seed_file(path)
