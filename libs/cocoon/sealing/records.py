"""Typed, padded records inside authenticated frames (libsodium's secretstream).

frame = u32 length || push(record); record = type u8 || u16 length || content || zeros.
The stream's counter refuses reorder, drop and repeat; the FINAL tag marks the only end.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nacl.bindings import (
    crypto_secretstream_xchacha20poly1305_ABYTES,
    crypto_secretstream_xchacha20poly1305_HEADERBYTES,
    crypto_secretstream_xchacha20poly1305_init_pull,
    crypto_secretstream_xchacha20poly1305_init_push,
    crypto_secretstream_xchacha20poly1305_pull,
    crypto_secretstream_xchacha20poly1305_push,
    crypto_secretstream_xchacha20poly1305_state,
    crypto_secretstream_xchacha20poly1305_TAG_FINAL,
    crypto_secretstream_xchacha20poly1305_TAG_MESSAGE,
)
from nacl.exceptions import RuntimeError as SodiumError

from cocoon.sealing.padding import MAX_RECORD_BYTES, RECORD_HEADER_BYTES, RecordType, SizeRule
from cocoon.sealing.refusals import refuse

STREAM_HEADER_BYTES: Final = crypto_secretstream_xchacha20poly1305_HEADERBYTES  # 24
FRAME_LENGTH_BYTES: Final = 4
STREAM_TAG_BYTES: Final = crypto_secretstream_xchacha20poly1305_ABYTES  # 17
MAX_FRAME_BYTES: Final = MAX_RECORD_BYTES + STREAM_TAG_BYTES  # 32,785
MIN_FRAME_BYTES: Final = RECORD_HEADER_BYTES + STREAM_TAG_BYTES
_ZEROS: Final = bytes(MAX_RECORD_BYTES)
_MESSAGE: Final = crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_FINAL: Final = crypto_secretstream_xchacha20poly1305_TAG_FINAL
_TYPES: Final = tuple(RecordType)


class Record(NamedTuple):
    """One opened record. Its repr shows no content."""

    kind: RecordType
    content: bytes
    final: bool

    def __repr__(self) -> str:
        return f"Record({self.kind.name}, {len(self.content)} bytes, final={self.final})"


class FrameSealer:
    """Seals records in order under one key. `header` (24 bytes) goes before the first frame."""

    __slots__ = ("_aad", "_done", "_rule", "_state", "header")

    def __init__(self, key: bytes, *, aad: bytes, rule: SizeRule) -> None:
        self._state = crypto_secretstream_xchacha20poly1305_state()
        # libsodium draws the stream's header itself: fresh per stream, not reproducible
        self.header: bytes = crypto_secretstream_xchacha20poly1305_init_push(self._state, key)
        self._aad = aad
        self._rule = rule
        self._done = False

    def seal(self, kind: RecordType, content: bytes, *, final: bool = False) -> bytes:
        """Return one frame. Raises SealingError(record_too_large) when it does not fit."""
        if self._done:
            raise ValueError("the stream has its final frame; open another stream")
        size = self._rule.size_for(kind, len(content))
        record = b"%c%b%b" % (kind, len(content).to_bytes(2, "big"), content)
        ciphertext = crypto_secretstream_xchacha20poly1305_push(
            self._state, record.ljust(size, b"\x00"), self._aad, _FINAL if final else _MESSAGE
        )
        self._done = final
        return len(ciphertext).to_bytes(4, "big") + ciphertext


class FrameOpener:
    """Opens frames in order and refuses everything that an honest sealer does not make."""

    __slots__ = ("_aad", "_rule", "_state")

    def __init__(self, key: bytes, stream_header: bytes, *, aad: bytes, rule: SizeRule) -> None:
        self._state = crypto_secretstream_xchacha20poly1305_state()
        crypto_secretstream_xchacha20poly1305_init_pull(self._state, stream_header, key)
        self._aad = aad
        self._rule = rule

    def open(self, ciphertext: bytes) -> Record:
        """Open one frame's ciphertext (without its length).

        Raises SealingError: decrypt_failed, bad_tag (tag or type), bad_padding.
        """
        try:
            record, tag = crypto_secretstream_xchacha20poly1305_pull(
                self._state, ciphertext, self._aad
            )
        except SodiumError:
            refuse("decrypt_failed", "A frame does not open: it was changed, moved or forged.")
        if tag not in (_MESSAGE, _FINAL) or record[0] >= len(_TYPES):
            refuse("bad_tag", "A frame has a tag or a record type that CAI/1 does not know.")
        length = record[1] << 8 | record[2]
        end = RECORD_HEADER_BYTES + length
        if (
            end > len(record)
            or not _ZEROS.startswith(record[end:])
            or not self._rule.allows(record[0], len(record), length)
        ):
            refuse("bad_padding", "A record's size or padding is not what its profile makes.")
        return Record(_TYPES[record[0]], record[RECORD_HEADER_BYTES:end], tag == _FINAL)


def frame_length(data: bytes, offset: int) -> int:
    """Return the ciphertext length of the frame at `offset` (its 4 length bytes are there).

    Raises SealingError(record_too_large, truncated) outside 20..32,785.
    """
    length = int.from_bytes(data[offset : offset + FRAME_LENGTH_BYTES], "big")
    if length > MAX_FRAME_BYTES:
        refuse("record_too_large", "A frame is larger than 32,785 bytes.")
    if length < MIN_FRAME_BYTES:
        refuse("truncated", "A frame is too short to hold a record.")
    return length


def seal_content(
    sealer: FrameSealer, rule: SizeRule, content: bytes, *, final: bool
) -> list[bytes]:
    """Cut content (not empty) into data records and seal them; the last may be FINAL."""
    capacity = rule.capacity()
    starts = range(0, len(content), capacity)
    last = starts[-1]
    return [
        sealer.seal(
            RecordType.DATA, content[start : start + capacity], final=final and start == last
        )
        for start in starts
    ]
