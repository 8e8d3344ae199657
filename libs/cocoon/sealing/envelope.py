"""The sealed request's header: what gateway, matcher and enclave read without any key.

Strict both ways: a header outside the bounds is neither written nor read. The header names
no prompt, user or account; what it leaks is listed in docs/protocol.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cocoon.sealing.derive import sha256
from cocoon.sealing.padding import Profile
from cocoon.sealing.records import FRAME_LENGTH_BYTES, MIN_FRAME_BYTES, STREAM_HEADER_BYTES
from cocoon.sealing.refusals import refuse

MAGIC: Final = b"CAI1"
TYPE_REQUEST: Final = 1
TYPE_RESPONSE: Final = 2
SUITE_X25519: Final = 1  # suite 2 (post-quantum) is reserved and refused
MAX_RECIPIENTS: Final = 8
MAX_ENVELOPE_BYTES: Final = 8 * 1024 * 1024
MAX_PRICE_NANOTON: Final = 2**63 - 1

_FIXED: Final = struct.Struct(">4sBBH16s32sQIIQ32sB")
_SLOT: Final = struct.Struct(">16s32s48s")
FIXED_BYTES: Final = _FIXED.size  # 113
SLOT_BYTES: Final = _SLOT.size  # 96
_PADDED: Final = 1 << 0
_STREAM: Final = 1 << 1
_PROFILE_SHIFT: Final = 2
_KNOWN_FLAGS: Final = _PADDED | _STREAM | 0b1111 << _PROFILE_SHIFT
_MIN_TAIL_BYTES: Final = STREAM_HEADER_BYTES + FRAME_LENGTH_BYTES + MIN_FRAME_BYTES


def pack_flags(profile: Profile, *, stream: bool) -> int:
    """Return the header's flags. Raises SealingError(bad_request) for an impossible pair."""
    padded = 0 if profile is Profile.P3 else _PADDED
    flags = padded | (_STREAM if stream else 0) | profile << _PROFILE_SHIFT
    _unpack_flags(flags)
    return flags


@lru_cache(maxsize=64)
def _unpack_flags(flags: int) -> tuple[Profile, bool]:
    number = flags >> _PROFILE_SHIFT & 0b1111
    if flags & ~_KNOWN_FLAGS or number > Profile.P3:
        refuse("bad_request", "The header has flags that CAI/1 does not know.", param="flags")
    profile, stream = Profile(number), bool(flags & _STREAM)
    if bool(flags & _PADDED) == (profile is Profile.P3):
        refuse("bad_request", "Profile P3, and only it, goes without padding.", param="flags")
    if profile is not Profile.P3 and stream == (profile is Profile.P0):
        refuse("bad_request", "P0 is for one body, P1 and P2 are for streams.", param="flags")
    return profile, stream


@dataclass(frozen=True, slots=True)
class RecipientSlot:
    """One recipient's share of the header: which key, its HPKE enc, the wrapped content key."""

    key_id: bytes
    enc: bytes
    wrapped_cek: bytes


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """The clear header. Money in nanoTON, times in Unix milliseconds, ids as raw bytes."""

    job_id: bytes
    model_id: bytes
    max_price_nanoton: int
    max_input_tokens: int
    max_output_tokens: int
    not_after_ms: int
    policy_hash: bytes
    flags: int
    recipients: tuple[RecipientSlot, ...] = ()
    suite: int = SUITE_X25519

    @property
    def profile(self) -> Profile:
        return _unpack_flags(self.flags)[0]

    @property
    def stream(self) -> bool:
        return bool(self.flags & _STREAM)

    @property
    def padded(self) -> bool:
        return bool(self.flags & _PADDED)

    @property
    def key_ids(self) -> tuple[bytes, ...]:
        return tuple(slot.key_id for slot in self.recipients)

    def encode_fixed(self, recipient_count: int) -> bytes:
        """The 113 fixed bytes, which are HPKE's info. Raises SealingError(bad_request)."""
        sizes = (len(self.job_id), len(self.model_id), len(self.policy_hash))
        if sizes != (16, 32, 32):
            refuse("bad_request", "job_id is 16 bytes, model_id and policy_hash are 32.")
        _check(self, recipient_count)
        try:
            return _FIXED.pack(
                MAGIC, TYPE_REQUEST, self.suite, self.flags, self.job_id, self.model_id,
                self.max_price_nanoton, self.max_input_tokens, self.max_output_tokens,
                self.not_after_ms, self.policy_hash, recipient_count,
            )  # fmt: skip
        except struct.error:
            refuse("bad_request", "A number of the header is out of its range.")

    def encode(self) -> bytes:
        """The whole header: fixed part and recipients."""
        _check_slots(self.recipients)
        return self.encode_fixed(len(self.recipients)) + b"".join(
            slot.key_id + slot.enc + slot.wrapped_cek for slot in self.recipients
        )


def _check(header: RequestHeader, recipient_count: int) -> None:
    if header.suite != SUITE_X25519:
        refuse("bad_suite", "Only suite 1 is spoken here; suite 2 is reserved.")
    _unpack_flags(header.flags)
    if not 1 <= recipient_count <= MAX_RECIPIENTS:
        refuse("bad_request", "A request has 1 to 8 recipients.", param="recipients")
    if not 0 <= header.max_price_nanoton <= MAX_PRICE_NANOTON:
        refuse("bad_request", "max_price is below 2**63 nanoTON.", param="max_price_nanoton")


def _check_slots(slots: tuple[RecipientSlot, ...]) -> None:
    for slot in slots:
        if (len(slot.key_id), len(slot.enc), len(slot.wrapped_cek)) != (16, 32, 48):
            refuse("bad_request", "A recipient is key_id 16, enc 32 and wrapped key 48 bytes.")
    if len({slot.key_id for slot in slots}) != len(slots):
        refuse("bad_request", "A recipient is named twice.", param="recipients")


def parse_header(envelope: bytes) -> tuple[RequestHeader, int]:
    """Parse a request's header and return it with its length in bytes. Needs no key.

    Raises SealingError: record_too_large (over 8 MiB), truncated, bad_magic, bad_suite,
    bad_request. It does not authenticate: only the enclave can.
    """
    if len(envelope) > MAX_ENVELOPE_BYTES:
        refuse("record_too_large", "A sealed request is at most 8 MiB; send less.")
    if envelope[:4] != MAGIC[: len(envelope)]:
        refuse("bad_magic", "This is not a CAI/1 request.")
    if len(envelope) < FIXED_BYTES:
        refuse("truncated", "The sealed request is cut off.")
    (_, kind, suite, flags, job_id, model_id, max_price, max_in, max_out, not_after_ms,
     policy_hash, count) = _FIXED.unpack_from(envelope)  # fmt: skip
    if kind != TYPE_REQUEST:
        refuse("bad_magic", "This is not a CAI/1 request.")
    if suite == SUITE_X25519 and 1 <= count <= MAX_RECIPIENTS:
        header_len = FIXED_BYTES + count * SLOT_BYTES
        if len(envelope) < header_len + _MIN_TAIL_BYTES:
            refuse("truncated", "The sealed request is cut off.")
        slots = tuple(
            RecipientSlot(*_SLOT.unpack_from(envelope, FIXED_BYTES + index * SLOT_BYTES))
            for index in range(count)
        )
    else:
        header_len, slots = 0, ()
    header = RequestHeader(
        job_id=job_id, model_id=model_id, max_price_nanoton=max_price, max_input_tokens=max_in,
        max_output_tokens=max_out, not_after_ms=not_after_ms, policy_hash=policy_hash,
        flags=flags, recipients=slots, suite=suite,
    )  # fmt: skip
    _check(header, count)
    _check_slots(slots)
    return header, header_len


def request_hash(envelope: bytes) -> bytes:
    """req_hash: SHA-256 of the whole envelope, which names exactly these bytes."""
    return sha256(envelope)
