"""Padding profiles: which sizes a record may have, so that sizes tell little or nothing.

Pure tables. When records leave is pacing.py's question.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cocoon.sealing.refusals import refuse

RECORD_HEADER_BYTES: Final = 3  # type u8, length u16
BUCKETS: Final = (128, 512, 2048, 8192, 32768)
MAX_RECORD_BYTES: Final = BUCKETS[-1]
MAX_OBJECT_BYTES: Final = 1024 * 1024  # a stream's object, an error or a usage, cut or not
COUNT_STEP: Final = 64  # P0 and P1 round a receipt's token counts up to this


class Profile(IntEnum):
    """P0 one padded body; P1 fixed cadence; P2 coalesced (streams' default); P3 no padding."""

    P0 = 0
    P1 = 1
    P2 = 2
    P3 = 3


class RecordType(IntEnum):
    """PART holds the beginning of a DATA, ERROR or USAGE that does not fit one record."""

    DATA = 0
    RECEIPT = 1
    ERROR = 2
    PAD = 3
    USAGE = 4
    PART = 5


@dataclass(frozen=True, slots=True)
class SizeRule:
    """The record sizes of one direction. Empty `sizes` means exact: no padding at all."""

    sizes: tuple[int, ...]
    closing_min: int  # usage and error records are at least this big
    receipt_size: int

    def capacity(self) -> int:
        """The most content bytes that one data record holds."""
        return (self.sizes[-1] if self.sizes else MAX_RECORD_BYTES) - RECORD_HEADER_BYTES

    def size_for(self, kind: RecordType, content_bytes: int) -> int:
        """Return the padded record size. Raises SealingError(record_too_large)."""
        needed = content_bytes + RECORD_HEADER_BYTES
        if not self.sizes:
            size = needed if needed <= MAX_RECORD_BYTES else 0
        elif kind is RecordType.RECEIPT:
            size = self.receipt_size if needed <= self.receipt_size else 0
        else:
            if kind is RecordType.USAGE or kind is RecordType.ERROR:
                needed = max(needed, self.closing_min)
            for size in self.sizes:
                if needed <= size:
                    return size
            size = 0
        if not size:
            refuse("record_too_large", "The content does not fit one record; cut it into parts.")
        return size

    def allows(self, kind: int, size: int, content_bytes: int) -> bool:
        """Whether a received record of this size is one that the profile makes."""
        if not self.sizes:
            return size == content_bytes + RECORD_HEADER_BYTES
        if kind == RecordType.RECEIPT:
            return size == self.receipt_size
        return size in self.sizes


_EXACT: Final = SizeRule((), 0, 0)
_REQUEST_PADDED: Final = SizeRule(BUCKETS, 0, 0)
_RESPONSE: Final = {
    Profile.P0: SizeRule(BUCKETS, 512, 512),
    Profile.P1: SizeRule((256,), 256, 512),
    Profile.P2: SizeRule((128, 512), 512, 512),
    Profile.P3: _EXACT,
}


def request_rule(profile: Profile) -> SizeRule:
    """Requests are padded to BUCKETS under every profile but P3."""
    return _EXACT if profile is Profile.P3 else _REQUEST_PADDED


def response_rule(profile: Profile) -> SizeRule:
    return _RESPONSE[profile]


def default_profile(*, stream: bool) -> Profile:
    """P2 for a stream, P0 for one body."""
    return Profile.P2 if stream else Profile.P0


def public_count(profile: Profile, tokens: int, bound: int) -> int:
    """The token count that a receipt shows: exact, or under P0 and P1 rounded up to 64s.

    Rounding stops at the header's bound, so that a full answer still fits the hold.
    """
    if profile is Profile.P2 or profile is Profile.P3:
        return tokens
    return max(tokens, min(-(-tokens // COUNT_STEP) * COUNT_STEP, bound))


def is_public_count(profile: Profile, count: int, bound: int) -> bool:
    """Whether a receipt's count has the form that `public_count` gives."""
    if count > bound:
        return False
    return profile in (Profile.P2, Profile.P3) or count % COUNT_STEP == 0 or count == bound
