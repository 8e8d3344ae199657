"""The enclave's side: open a request that passed every check, seal its response.

The X25519 secrets stay with an `EnclaveKeys` (a child process); everything here works from one
job's derived bytes. Clear errors to the outside go through `refusals.outside_code`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

from nacl.bindings import crypto_aead_chacha20poly1305_ietf_decrypt
from nacl.exceptions import CryptoError

from cocoon.sealing import hpke
from cocoon.sealing.client import MAX_ENDPOINT_BYTES, WRAP_NONCE
from cocoon.sealing.derive import (
    OUTPUT_LABEL,
    PROMPT_LABEL,
    commit,
    new_commit,
    request_keys,
    response_key,
    sha256,
)
from cocoon.sealing.envelope import (
    FIXED_BYTES,
    RecipientSlot,
    RequestHeader,
    parse_header,
    request_hash,
)
from cocoon.sealing.keys import EnclaveKeys, JobExports
from cocoon.sealing.padding import MAX_OBJECT_BYTES, RecordType, request_rule, response_rule
from cocoon.sealing.prefix import ResponsePrefix
from cocoon.sealing.receipt import RECEIPT_BYTES, Receipt, Status
from cocoon.sealing.records import (
    FRAME_LENGTH_BYTES,
    STREAM_HEADER_BYTES,
    FrameOpener,
    FrameSealer,
    frame_length,
    seal_content,
)
from cocoon.sealing.refusals import refuse


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request whose clear header this enclave may serve. Not authentic before it is opened."""

    header: RequestHeader
    slot: RecipientSlot
    req_hash: bytes
    envelope: bytes = field(repr=False)
    header_len: int

    @property
    def fixed_header(self) -> bytes:
        """What the key's holder needs beside the slot."""
        return self.envelope[:FIXED_BYTES]


@dataclass(frozen=True, slots=True)
class OpenedRequest:
    """An authentic request. Content and keys never print."""

    header: RequestHeader
    slot: RecipientSlot
    req_hash: bytes
    endpoint: str
    body: bytes = field(repr=False)
    prompt_commit: bytes
    commit_key: bytes = field(repr=False)
    response_secret: JobExports = field(repr=False)
    resp_eph_pk: bytes


def accept_request(
    envelope: bytes,
    *,
    key_ids: Collection[bytes],
    now_ms: int,
    policy_hashes: Collection[bytes],
    model_ids: Collection[bytes],
    expected_req_hash: bytes | None = None,
) -> Accepted:
    """Check all that the clear header tells, before any key is used.

    policy_hashes: the current one and, for an hour, the one before. expected_req_hash: what the
    dispatch named, so that no other body runs under the same header. Raises SealingError: what
    parse_header raises, wrong_job, expired, wrong_policy, wrong_model, unknown_key.
    """
    header, header_len = parse_header(envelope)
    req_hash = request_hash(envelope)
    if expected_req_hash is not None and req_hash != expected_req_hash:
        refuse("wrong_job", "These are not the bytes that the dispatch named.")
    if now_ms > header.not_after_ms:
        refuse("expired", "The request's time is over; make a new one.")
    if header.policy_hash not in policy_hashes:
        refuse("wrong_policy", "The request was made under another policy; refresh and reseal.")
    if header.model_id not in model_ids:
        refuse("wrong_model", "This enclave does not serve that model.")
    slot = next((slot for slot in header.recipients if slot.key_id in key_ids), None)
    if slot is None:
        refuse("unknown_key", "The request is for other keys; refresh the directory and reseal.")
    return Accepted(header, slot, req_hash, envelope, header_len)


def open_accepted(accepted: Accepted, exports: JobExports, *, resp_eph_pk: bytes) -> OpenedRequest:
    """Authenticate and open an accepted request with one job's exports.

    Raises SealingError: decrypt_failed, truncated, record_too_large, bad_tag, bad_padding,
    data_after_final, bad_request (no endpoint).
    """
    slot, envelope = accepted.slot, accepted.envelope
    try:
        cek = crypto_aead_chacha20poly1305_ietf_decrypt(
            slot.wrapped_cek, slot.key_id + slot.enc, WRAP_NONCE, exports.wrap_key
        )
    except CryptoError:
        refuse("decrypt_failed", "The request's content key does not unwrap: it was changed.")
    header_hash = sha256(envelope[: accepted.header_len])
    stream_key, commit_key = request_keys(header_hash, cek)
    body_start = accepted.header_len + STREAM_HEADER_BYTES
    opener = FrameOpener(
        stream_key,
        envelope[accepted.header_len : body_start],
        aad=header_hash,
        rule=request_rule(accepted.header.profile),
    )
    content = _read_content(opener, envelope, body_start)
    endpoint, body = _split_content(content)
    return OpenedRequest(
        header=accepted.header, slot=slot, req_hash=accepted.req_hash, endpoint=endpoint,
        body=body, prompt_commit=commit(commit_key, PROMPT_LABEL, content),
        commit_key=commit_key, response_secret=exports, resp_eph_pk=resp_eph_pk,
    )  # fmt: skip


def open_request(
    envelope: bytes,
    *,
    keys: EnclaveKeys,
    resp_eph_sk: bytes,
    now_ms: int,
    policy_hashes: Collection[bytes],
    model_ids: Collection[bytes],
    expected_req_hash: bytes | None = None,
) -> OpenedRequest:
    """Accept, derive and open in one call; `resp_eph_sk` is 32 fresh random bytes, used once.

    Where the key's holder is asynchronous, call accept_request, the holder and open_accepted.
    Ask the replay memory afterwards, before running anything. Raises what these raise.
    """
    accepted = accept_request(
        envelope, key_ids=keys.key_ids(), now_ms=now_ms, policy_hashes=policy_hashes,
        model_ids=model_ids, expected_req_hash=expected_req_hash,
    )  # fmt: skip
    slot = accepted.slot
    exports = keys.job_exports(slot.key_id, slot.enc, accepted.fixed_header, resp_eph_sk)
    return open_accepted(accepted, exports, resp_eph_pk=hpke.public_key(resp_eph_sk))


def _read_content(opener: FrameOpener, envelope: bytes, offset: int) -> bytes:
    """Open every frame up to FINAL, which must be the envelope's end."""
    pieces: list[bytes] = []
    size, final = len(envelope), False
    while offset < size:
        if final:
            refuse("data_after_final", "Bytes came after the request's last frame.")
        if size - offset < FRAME_LENGTH_BYTES:
            break
        start = offset + FRAME_LENGTH_BYTES
        offset = start + frame_length(envelope, offset)
        if offset > size:
            refuse("truncated", "The sealed request is cut off.")
        record = opener.open(envelope[start:offset])
        if record.kind is RecordType.DATA:
            pieces.append(record.content)
        elif record.kind is not RecordType.PAD or record.content:
            refuse("bad_tag", "A request holds data and empty pad records only.")
        final = record.final
    if not final:
        refuse("truncated", "The sealed request is cut off.")
    return b"".join(pieces)


def _split_content(content: bytes) -> tuple[str, bytes]:
    name, zero, body = content.partition(b"\x00")
    if not zero or not 1 <= len(name) <= MAX_ENDPOINT_BYTES or not name.isascii():
        refuse("bad_request", "The request names no endpoint.", param="endpoint")
    return name.decode("ascii"), body


class ResponseSealer:
    """Seals one response, in order, and keeps the hashes that its receipt needs.

    Every method returns the bytes to send. Send `prefix()` first and `finish()` last.
    """

    def __init__(self, opened: OpenedRequest) -> None:
        header = opened.header
        prefix = ResponsePrefix(
            header.job_id, opened.slot.key_id, opened.req_hash, opened.resp_eph_pk
        ).encode()
        prefix_hash = sha256(prefix)
        secret = opened.response_secret
        key = response_key(prefix_hash, secret.response_export, secret.ephemeral_dh)
        self._opened = opened
        self._rule = response_rule(header.profile)
        self._capacity = self._rule.capacity()
        self._frames = FrameSealer(key, aad=prefix_hash, rule=self._rule)
        self._opening = prefix + self._frames.header
        self._hash = hashlib.sha256(self._opening)
        self._output = new_commit(opened.commit_key, OUTPUT_LABEL)

    def prefix(self) -> bytes:
        """rh and the secretstream header: the first 128 bytes."""
        return self._opening

    def data(self, content: bytes) -> bytes:
        """Seal a stream's JSON object, or a piece of the one body; cut where it does not fit.

        Raises SealingError(record_too_large) for a stream's object over 1 MiB.
        """
        if len(content) <= self._capacity:
            sealed = self._frames.seal(RecordType.DATA, content)
        elif self._opened.header.stream:
            return self._cut(RecordType.DATA, content)
        else:
            sealed = b"".join(seal_content(self._frames, self._rule, content, final=False))
        self._output.update(content)
        self._hash.update(sealed)
        return sealed

    def usage(self, content: bytes) -> bytes:
        """Seal the exact OpenAI usage object (JSON bytes). Once per response."""
        return self._cut(RecordType.USAGE, content)

    def error(self, content: bytes) -> bytes:
        """Seal the OpenAI error object (JSON bytes). Once per response; a receipt follows."""
        return self._cut(RecordType.ERROR, content)

    def pad(self) -> bytes:
        """Seal a record that says nothing."""
        return self._cut(RecordType.PAD, b"")

    def _cut(self, kind: RecordType, content: bytes) -> bytes:
        """Seal as PARTs, closed by a record of `kind`."""
        if len(content) > MAX_OBJECT_BYTES:
            refuse("record_too_large", "One object of a response is at most 1 MiB.")
        step = self._capacity
        last = max(len(content) - 1, 0) // step * step
        frames = [
            self._frames.seal(RecordType.PART, content[at : at + step])
            for at in range(0, last, step)
        ]
        frames.append(self._frames.seal(kind, content[last:]))
        sealed = b"".join(frames)
        if kind is RecordType.DATA:
            self._output.update(content)
        self._hash.update(sealed)
        return sealed

    def receipt(
        self, *, status: Status, epoch: int, quote_id: bytes, input_tokens: int,
        cached_input_tokens: int, output_tokens: int, reasoning_tokens: int, price_nanoton: int,
        opened_ms: int, first_ms: int, last_ms: int, evidence_id: bytes, seq: int,
        prev_receipt_hash: bytes,
    ) -> Receipt:  # fmt: skip
        """Fill in what the sealed bytes decide: ids, hashes and commitments, as they stand now."""
        opened = self._opened
        return Receipt(
            status=status, job_id=opened.header.job_id, epoch=epoch, key_id=opened.slot.key_id,
            model_id=opened.header.model_id, quote_id=quote_id, req_hash=opened.req_hash,
            resp_hash=self._hash.digest(), prompt_commit=opened.prompt_commit,
            output_commit=self._output.digest(), input_tokens=input_tokens,
            cached_input_tokens=cached_input_tokens, output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens, price_nanoton=price_nanoton, opened_ms=opened_ms,
            first_ms=first_ms, last_ms=last_ms, evidence_id=evidence_id, seq=seq,
            prev_receipt_hash=prev_receipt_hash, suite=opened.header.suite,
        )  # fmt: skip

    def finish(self, receipt: bytes) -> bytes:
        """Seal the signed 420-byte receipt as the FINAL frame; nothing can follow."""
        if len(receipt) != RECEIPT_BYTES:
            raise ValueError("a signed receipt is 420 bytes")
        return self._frames.seal(RecordType.RECEIPT, receipt, final=True)
