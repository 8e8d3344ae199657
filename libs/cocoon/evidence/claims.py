"""The 224 bytes that tie a quote to keys, models and a challenge, and the hashes around them.

Byte layouts are those of CAI/1's identity binding. Nothing here verifies a quote.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

CLAIMS_BYTES = 224
NO_GPU = bytes(32)  # gpu_evidence_hash of a provider without GPU evidence
_FORM = struct.Struct(">4sBBH32s32sQQQ32s32s32s32s")
_MAGIC = b"CAIB"
_VERSION = 1
_MAX_TIME_MS = 2**53
_TDX_V4_SIGNED = 632
_TDX_V5_HEADER = 54
_SNP_SIGNED = 0x2A0
_OPEN_SIGNED = 101  # magic, version, identity key, report data


class TeeKind(IntEnum):
    """The kind of machine that vouches for the claims; the byte in the claims."""

    NONE = 0  # none: the provider's identity key signs them (open_tier.py)
    TDX = 1
    SNP = 2


@dataclass(frozen=True, slots=True)
class Claims:
    """What the enclave says about itself. Byte fields are 32 bytes; times are Unix ms."""

    tee: TeeKind
    x25519_public: bytes
    ed25519_public: bytes
    key_epoch: int
    not_before_ms: int
    not_after_ms: int
    models_root: bytes
    config_hash: bytes
    gpu_evidence_hash: bytes
    challenge: bytes

    def encode(self) -> bytes:
        """Return the 224 bytes. Raises ValueError for a field of another size or range."""
        for value in (
            self.x25519_public, self.ed25519_public, self.models_root, self.config_hash,
            self.gpu_evidence_hash, self.challenge,
        ):  # fmt: skip
            if len(value) != 32:
                raise ValueError("the claims' keys, roots and hashes are 32 bytes each")
        if not 0 <= self.not_before_ms < self.not_after_ms <= _MAX_TIME_MS:
            raise ValueError("the claims must end after they begin")
        if not 0 <= self.key_epoch <= _MAX_TIME_MS:
            raise ValueError("the key epoch is out of range")
        return _FORM.pack(
            _MAGIC, _VERSION, self.tee, 0, self.x25519_public, self.ed25519_public,
            self.key_epoch, self.not_before_ms, self.not_after_ms, self.models_root,
            self.config_hash, self.gpu_evidence_hash, self.challenge,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Claims:
        """Parse 224 bytes. Raises ValueError for anything that `encode` would not write."""
        if len(data) != CLAIMS_BYTES:
            raise ValueError(f"claims are {CLAIMS_BYTES} bytes")
        magic, version, tee, flags, *rest = _FORM.unpack(data)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError("these are not claims of version 1")
        if flags:
            raise ValueError("the claims carry flags that this version does not know")
        claims = cls(TeeKind(tee), *rest)
        claims.encode()  # the same ranges hold in both directions
        return claims


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def report_data(claims: bytes) -> bytes:
    """The 64 bytes a quote must carry to cover these encoded claims."""
    return hashlib.sha512(b"cai/1 report_data\0" + claims).digest()


def models_root(model_ids: Iterable[bytes]) -> bytes:
    """One hash over the sorted 32-byte model ids."""
    return _sha256(b"cai/1 models\0", *sorted(model_ids))


def gpu_nonce(challenge_: bytes, x25519_public: bytes, ed25519_public: bytes) -> bytes:
    """The nonce that every GPU report must carry, so that it covers the enclave's keys."""
    return _sha256(b"cai/1 gpu nonce\0", challenge_, x25519_public, ed25519_public)


def gpu_evidence_hash(reports: Sequence[bytes]) -> bytes:
    """The hash by which the quote covers the GPU reports; 32 zeros for none."""
    if not reports:
        return NO_GPU
    framed = [struct.pack(">I", len(report)) + report for report in reports]
    return _sha256(b"cai/1 gpu evidence\0", *framed)


def challenge(checkpoint_root: bytes, provider_id: str, random: bytes) -> bytes:
    """The challenge for one provider: evidence that holds it is younger than the checkpoint.

    `checkpoint_root` and `random` are 32 bytes each; ValueError otherwise.
    """
    if len(checkpoint_root) != 32 or len(random) != 32:
        raise ValueError("a checkpoint root and a challenge's random part are 32 bytes each")
    return _sha256(b"cai/1 challenge\0", checkpoint_root, provider_id.encode(), random)


def signed_part(tee: TeeKind, evidence: bytes) -> bytes:
    """The bytes that the hardware, or an identity key, signed. Raises ValueError where they are
    not all there.

    Everything after them can be changed by anyone (trailing bytes, high s, PEM), so no identity
    may be taken from the whole.
    """
    size = _OPEN_SIGNED if tee is TeeKind.NONE else _SNP_SIGNED
    if tee is TeeKind.TDX:
        version = int.from_bytes(evidence[:2], "little")
        if version == 4:
            size = _TDX_V4_SIGNED
        elif version == 5:
            size = _TDX_V5_HEADER + int.from_bytes(evidence[50:54], "little")
        else:
            raise ValueError("a TDX quote has version 4 or 5")
    if len(evidence) < size:
        raise ValueError("the evidence is shorter than its signed part")
    return evidence[:size]


def evidence_id(tee: TeeKind, evidence: bytes) -> bytes:
    """The 32-byte identity of evidence, equal for every copy of the same signed part."""
    return _sha256(b"cai/1 evidence\0", bytes([tee]), signed_part(tee, evidence))
