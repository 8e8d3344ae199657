"""Enclave keys: the signed key bundle that announces them, and the ring that holds them.

An X25519 key lives for one epoch (10 minutes, 2 of overlap) and is then forgotten. `KeyRing`
belongs in a child process: only per-job bytes leave it, and ending the process erases it,
which Python's own memory cannot do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from nacl.signing import SigningKey

from cocoon.kernel.clock import Randomness
from cocoon.sealing import hpke
from cocoon.sealing.derive import RESPONSE_LABEL, WRAP_LABEL, hpke_info, key_id
from cocoon.sealing.envelope import SUITE_X25519
from cocoon.sealing.receipt import verify_signature
from cocoon.sealing.refusals import refuse

EPOCH_MS: Final = 10 * 60 * 1000
OVERLAP_MS: Final = 2 * 60 * 1000
MAX_BUNDLE_MS: Final = EPOCH_MS + OVERLAP_MS
CLOCK_SKEW_MS: Final = 5_000  # how far ahead an enclave's clock may run
MAX_RING_KEYS: Final = 4
_MAGIC: Final = b"CAIK"
_CONTEXT: Final = b"cai/1 key bundle\x00"
_BODY: Final = struct.Struct(">4sB32sQQQ32s")
BUNDLE_BYTES: Final = _BODY.size + 64  # 157


@dataclass(frozen=True, slots=True)
class KeyBundle:
    """One epoch's X25519 key, signed by the attested Ed25519 key. Times in Unix milliseconds."""

    x25519_pk: bytes
    epoch: int
    not_before_ms: int
    not_after_ms: int
    evidence_id: bytes
    suite: int = SUITE_X25519

    @property
    def key_id(self) -> bytes:
        return key_id(self.x25519_pk)

    def encode_body(self) -> bytes:
        """The 93 signed bytes. Raises ValueError for wrong widths, ranges or lifetimes."""
        if len(self.x25519_pk) != 32 or len(self.evidence_id) != 32:
            raise ValueError("x25519_pk and evidence_id are 32 bytes")
        if not 0 < self.not_after_ms - self.not_before_ms <= MAX_BUNDLE_MS:
            raise ValueError("a key bundle lives for at most 12 minutes")
        try:
            return _BODY.pack(
                _MAGIC, self.suite, self.x25519_pk, self.epoch, self.not_before_ms,
                self.not_after_ms, self.evidence_id,
            )  # fmt: skip
        except struct.error as error:
            raise ValueError("a number of the key bundle is out of its range") from error

    def sign(self, key: SigningKey) -> bytes:
        """Return the 157-byte bundle."""
        body = self.encode_body()
        return body + key.sign(_CONTEXT + body).signature

    def check_time(self, now_ms: int) -> None:
        """Raises SealingError(expired) outside [not_before, not_after)."""
        if not self.not_before_ms - CLOCK_SKEW_MS <= now_ms < self.not_after_ms:
            refuse("expired", "The enclave's key bundle is not valid now; refresh the directory.")


def verify_bundle(raw: bytes, *, ed25519_pk: bytes, evidence_id: bytes, now_ms: int) -> KeyBundle:
    """Check a bundle against the enclave's verified evidence and return it.

    Raises SealingError: truncated, bad_magic, bad_suite, receipt_sig, bad_key (other evidence,
    or a lifetime over 12 minutes), expired.
    """
    if len(raw) != BUNDLE_BYTES:
        refuse("truncated", "A key bundle is 157 bytes.")
    magic, suite, x25519_pk, epoch, not_before_ms, not_after_ms, evidence = _BODY.unpack_from(raw)
    if magic != _MAGIC:
        refuse("bad_magic", "This is not a key bundle.")
    if suite != SUITE_X25519:
        refuse("bad_suite", "Only suite 1 is spoken here; suite 2 is reserved.")
    verify_signature(_CONTEXT + raw[: _BODY.size], raw[_BODY.size :], ed25519_pk)
    if evidence != evidence_id:
        refuse("bad_key", "The key bundle belongs to other evidence; refresh the directory.")
    if not 0 < not_after_ms - not_before_ms <= MAX_BUNDLE_MS:
        refuse("bad_key", "The key bundle claims a lifetime that is not allowed.")
    bundle = KeyBundle(x25519_pk, epoch, not_before_ms, not_after_ms, evidence, suite)
    bundle.check_time(now_ms)
    return bundle


def latest_not_after_ms(bundles: Iterable[KeyBundle]) -> int:
    """The latest not_after that a request sealed to these bundles may carry: their earliest end.

    Raises ValueError for no bundle.
    """
    return min(bundle.not_after_ms for bundle in bundles)


class JobExports(NamedTuple):
    """All that leaves the key's holder for one job: 32 bytes each, good for that job alone."""

    wrap_key: bytes
    response_export: bytes
    ephemeral_dh: bytes

    def __repr__(self) -> str:
        return "JobExports(<secret>)"


class EnclaveKeys(Protocol):
    """The holder of X25519 secrets, as the rest of an enclave sees it."""

    def key_ids(self) -> frozenset[bytes]:
        """The keys held now."""

    def job_exports(
        self, key: bytes, enc: bytes, fixed_header: bytes, resp_eph_sk: bytes
    ) -> JobExports:
        """Derive one job's keys. Raises SealingError: unknown_key, bad_key."""


class KeyRing:
    """Holds the current and the overlapping keys. Its repr and its pickles show none of them."""

    __slots__ = ("_pairs",)

    def __init__(self) -> None:
        self._pairs: dict[bytes, tuple[bytes, bytes]] = {}

    def __repr__(self) -> str:
        return f"KeyRing({len(self._pairs)} keys)"

    def __reduce__(self) -> str:
        raise TypeError("a key ring is not serialised")

    def generate(self, randomness: Randomness) -> bytes:
        """Make a new epoch's key and return its public half."""
        return self.add(randomness.token(32))

    def add(self, secret_key: bytes) -> bytes:
        """Hold a given secret and return its public half. Raises ValueError when full."""
        if len(self._pairs) >= MAX_RING_KEYS:
            raise ValueError("the ring is full; forget ended epochs first")
        pk = hpke.public_key(secret_key)
        self._pairs[key_id(pk)] = (secret_key, pk)
        return pk

    def forget(self, key: bytes) -> None:
        """Drop an ended epoch's key. Unknown keys are nothing to do."""
        self._pairs.pop(key, None)

    def key_ids(self) -> frozenset[bytes]:
        return frozenset(self._pairs)

    def job_exports(
        self, key: bytes, enc: bytes, fixed_header: bytes, resp_eph_sk: bytes
    ) -> JobExports:
        """Derive one job's keys. Raises SealingError: unknown_key, bad_key."""
        pair = self._pairs.get(key)
        if pair is None:
            refuse("unknown_key", "This enclave no longer holds that key; refresh and reseal.")
        context = hpke.setup_receiver(enc, pair[0], hpke_info(fixed_header), own_pk=pair[1])
        return JobExports(
            context.export(WRAP_LABEL, 32),
            context.export(RESPONSE_LABEL, 32),
            hpke.x25519(resp_eph_sk, enc),
        )
