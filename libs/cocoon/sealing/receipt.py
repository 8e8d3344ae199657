"""The receipt: 420 bytes that an enclave signs once per job and that everybody checks.

The public receipt on the bus equals the sealed one byte for byte. It holds hashes, keyed
commitments, counts, the price and times; never a prompt, a result or a name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from cocoon.sealing.derive import sha256
from cocoon.sealing.envelope import MAX_PRICE_NANOTON, SUITE_X25519
from cocoon.sealing.refusals import refuse

RECEIPT_MAGIC: Final = b"CAIR"
RECEIPT_VERSION: Final = 2
_BODY: Final = struct.Struct(">4sBBH16sI16s32s32s32s32s32s32sIIIIQQQQ32sQ32s")
BODY_BYTES: Final = _BODY.size  # 356
SIGNATURE_BYTES: Final = 64
RECEIPT_BYTES: Final = BODY_BYTES + SIGNATURE_BYTES  # 420
CHAIN_START: Final = bytes(32)  # prev_receipt_hash of a key's first receipt
_CONTEXT: Final = b"cai/1 receipt\x00"


class Status(IntEnum):
    """How a job ended, as the enclave saw it."""

    COMPLETE = 0
    LENGTH = 1
    CANCELLED = 2
    REFUSED = 3
    FAILED = 4


_WIDTHS: Final = (
    ("job_id", 16), ("key_id", 16), ("model_id", 32), ("quote_id", 32), ("req_hash", 32),
    ("resp_hash", 32), ("prompt_commit", 32), ("output_commit", 32), ("evidence_id", 32),
    ("prev_receipt_hash", 32),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Receipt:
    """One job's account. Ids and hashes are raw bytes, times Unix milliseconds (a claim).

    `epoch` is the lease's epoch, not the key's. Raises ValueError for a wrong width.
    """

    status: Status
    job_id: bytes
    epoch: int
    key_id: bytes
    model_id: bytes
    quote_id: bytes
    req_hash: bytes
    resp_hash: bytes
    prompt_commit: bytes
    output_commit: bytes
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    price_nanoton: int
    opened_ms: int
    first_ms: int
    last_ms: int
    evidence_id: bytes
    seq: int
    prev_receipt_hash: bytes
    suite: int = SUITE_X25519

    def __post_init__(self) -> None:
        for name, width in _WIDTHS:
            if len(getattr(self, name)) != width:
                raise ValueError(f"{name} is {width} bytes")
        if not 0 <= self.price_nanoton <= MAX_PRICE_NANOTON:
            raise ValueError("price_nanoton is 0..2**63-1")

    def encode_body(self) -> bytes:
        """The 356 signed bytes. Raises ValueError for a number out of its range."""
        try:
            return _BODY.pack(
                RECEIPT_MAGIC, RECEIPT_VERSION, self.suite, self.status, self.job_id, self.epoch,
                self.key_id, self.model_id, self.quote_id, self.req_hash, self.resp_hash,
                self.prompt_commit, self.output_commit, self.input_tokens,
                self.cached_input_tokens, self.output_tokens, self.reasoning_tokens,
                self.price_nanoton, self.opened_ms, self.first_ms, self.last_ms,
                self.evidence_id, self.seq, self.prev_receipt_hash,
            )  # fmt: skip
        except struct.error as error:
            raise ValueError("a number of the receipt is out of its range") from error

    def sign(self, key: SigningKey) -> bytes:
        """Return the 420-byte receipt, signed by the enclave's Ed25519 key of this boot."""
        body = self.encode_body()
        return body + key.sign(_CONTEXT + body).signature

    @classmethod
    def decode(cls, raw: bytes) -> Receipt:
        """Parse 420 bytes without checking the signature.

        Raises SealingError: truncated, bad_magic, bad_suite, receipt_mismatch.
        """
        if len(raw) != RECEIPT_BYTES:
            refuse("truncated", "A receipt is 420 bytes.")
        (magic, version, suite, status, job_id, epoch, key_id, model_id, quote_id, req_hash,
         resp_hash, prompt_commit, output_commit, input_tokens, cached_input_tokens,
         output_tokens, reasoning_tokens, price_nanoton, opened_ms, first_ms, last_ms,
         evidence_id, seq, prev_receipt_hash) = _BODY.unpack_from(raw)  # fmt: skip
        if magic != RECEIPT_MAGIC or version != RECEIPT_VERSION:
            refuse("bad_magic", "This is not a version 2 receipt.")
        if suite != SUITE_X25519:
            refuse("bad_suite", "The receipt is of a suite that is not spoken here.")
        if status > Status.FAILED or price_nanoton > MAX_PRICE_NANOTON:
            refuse("receipt_mismatch", "The receipt's status or price is out of range.")
        return cls(
            status=Status(status), job_id=job_id, epoch=epoch, key_id=key_id, model_id=model_id,
            quote_id=quote_id, req_hash=req_hash, resp_hash=resp_hash,
            prompt_commit=prompt_commit, output_commit=output_commit, input_tokens=input_tokens,
            cached_input_tokens=cached_input_tokens, output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens, price_nanoton=price_nanoton, opened_ms=opened_ms,
            first_ms=first_ms, last_ms=last_ms, evidence_id=evidence_id, seq=seq,
            prev_receipt_hash=prev_receipt_hash, suite=suite,
        )  # fmt: skip


def verify_receipt(raw: bytes, ed25519_pk: bytes) -> Receipt:
    """Parse a receipt and check its signature by the attested Ed25519 key.

    Raises SealingError: receipt_sig, or what `Receipt.decode` raises.
    """
    receipt = Receipt.decode(raw)
    verify_signature(_CONTEXT + raw[:BODY_BYTES], raw[BODY_BYTES:], ed25519_pk)
    return receipt


def verify_signature(message: bytes, signature: bytes, ed25519_pk: bytes) -> None:
    """Raises SealingError(receipt_sig) unless the Ed25519 signature is right."""
    if len(ed25519_pk) != 32:
        refuse("bad_key", "An Ed25519 public key is 32 bytes.")
    try:
        VerifyKey(ed25519_pk).verify(message, signature)
    except BadSignatureError:
        refuse("receipt_sig", "The signature is not the attested key's.")


def receipt_hash(raw: bytes) -> bytes:
    """What the same key's next receipt carries as prev_receipt_hash: SHA-256 of all 420 bytes."""
    return sha256(raw)


def check_chain(previous_raw: bytes | None, next_raw: bytes) -> None:
    """Check that one receipt follows another of the same enclave key; None is the start.

    Raises SealingError(receipt_mismatch) for a gap, a fork or a wrong start.
    """
    following = Receipt.decode(next_raw)
    if previous_raw is None:
        linked = following.seq == 0 and following.prev_receipt_hash == CHAIN_START
    else:
        expected_seq = Receipt.decode(previous_raw).seq + 1
        expected_hash = receipt_hash(previous_raw)
        linked = (following.seq, following.prev_receipt_hash) == (expected_seq, expected_hash)
    if not linked:
        refuse("receipt_mismatch", "The enclave's receipts have a gap or a fork here.", param="seq")
