"""rh: the 104 clear bytes before a response's stream, bound to every frame by their hash."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from cocoon.sealing.envelope import MAGIC, SUITE_X25519, TYPE_RESPONSE
from cocoon.sealing.refusals import refuse

_PREFIX: Final = struct.Struct(">4sBBH16s16s32s32s")
PREFIX_BYTES: Final = _PREFIX.size  # 104


@dataclass(frozen=True, slots=True)
class ResponsePrefix:
    """Which job, key and request a response answers, and the enclave's ephemeral public key."""

    job_id: bytes
    key_id: bytes
    req_hash: bytes
    resp_eph_pk: bytes

    def encode(self) -> bytes:
        """The 104 bytes. The flags are reserved and zero."""
        return _PREFIX.pack(
            MAGIC, TYPE_RESPONSE, SUITE_X25519, 0, self.job_id, self.key_id, self.req_hash,
            self.resp_eph_pk,
        )  # fmt: skip


def parse_prefix(data: bytes) -> ResponsePrefix:
    """Parse a response's first 104 bytes; needs no key.

    Raises SealingError: truncated, bad_magic, bad_suite, bad_request (reserved flags).
    """
    if len(data) < PREFIX_BYTES:
        refuse("truncated", "The response is cut off.")
    magic, kind, suite, flags, job_id, key_id, req_hash, resp_eph_pk = _PREFIX.unpack_from(data)
    if magic != MAGIC or kind != TYPE_RESPONSE:
        refuse("bad_magic", "This is not a CAI/1 response.")
    if suite != SUITE_X25519:
        refuse("bad_suite", "The response is of a suite that the request did not use.")
    if flags:
        refuse("bad_request", "The response has flags that CAI/1 does not know.", param="flags")
    return ResponsePrefix(job_id, key_id, req_hash, resp_eph_pk)
