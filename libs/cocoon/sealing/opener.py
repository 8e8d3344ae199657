"""The client's side of a response: open it piece by piece and believe it only with its receipt.

Bounded: it holds at most one frame and one cut object. An answer without its FINAL receipt is
an error, never a short answer; after an error the opener stays closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cocoon.kernel.errors import SealingError
from cocoon.sealing import hpke
from cocoon.sealing.client import RequestSecrets
from cocoon.sealing.derive import OUTPUT_LABEL, new_commit, response_key, sha256
from cocoon.sealing.padding import MAX_OBJECT_BYTES, RecordType, is_public_count, response_rule
from cocoon.sealing.prefix import PREFIX_BYTES, ResponsePrefix, parse_prefix
from cocoon.sealing.receipt import RECEIPT_BYTES, Receipt, verify_receipt
from cocoon.sealing.records import (
    FRAME_LENGTH_BYTES,
    STREAM_HEADER_BYTES,
    FrameOpener,
    Record,
    frame_length,
)
from cocoon.sealing.refusals import refuse

MAX_RESPONSE_BYTES: Final = 64 * 1024 * 1024
_OPENING_BYTES: Final = PREFIX_BYTES + STREAM_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Data:
    """A stream's JSON object, or a piece of the one body."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """The exact OpenAI usage object, as JSON bytes."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """The OpenAI error object from inside the enclave, as JSON bytes."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: the checked receipt, and its 420 bytes to compare with the public one."""

    receipt: Receipt
    raw: bytes = field(repr=False)


Event = Data | Usage | ErrorRecord | Finished


class ResponseOpener:
    """Opens one response. Feed it bytes as they come, then `close()`.

    attested: the verified Ed25519 key of each recipient, by key_id. quote_id and epoch: what
    the gateway said the match cites, checked against the receipt where given.
    """

    def __init__(
        self,
        secrets: RequestSecrets,
        attested: Mapping[bytes, bytes],
        *,
        quote_id: bytes | None = None,
        epoch: int | None = None,
    ) -> None:
        self._secrets = secrets
        self._attested = dict(attested)
        self._quote_id = quote_id
        self._epoch = epoch
        self._pending = bytearray()
        self._need = _OPENING_BYTES
        self._received = 0
        self._prefix: ResponsePrefix | None = None
        self._frames: FrameOpener | None = None
        self._hash = hashlib.sha256()
        self._output = new_commit(secrets.commit_key, OUTPUT_LABEL)
        self._parts = bytearray()
        self._once: set[RecordType] = set()
        self._finished: Finished | None = None
        self._error: SealingError | None = None

    @property
    def received_bytes(self) -> int:
        """How many response bytes were fed: the offset to resume from."""
        return self._received

    @property
    def prefix(self) -> ResponsePrefix | None:
        """Who answers, once the first 128 bytes are there."""
        return self._prefix

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes, cut anywhere, and return what they complete.

        Content is authentic and in order when returned, but final only with `Finished`. Raises
        SealingError with an inside code; after that every call raises it again.
        """
        if self._error is not None:
            raise SealingError(self._error.message, code=self._error.code)
        try:
            return self._feed(chunk)
        except SealingError as error:
            self._error = error
            raise

    def close(self) -> Finished:
        """Say that no more bytes come, and return the checked end.

        Raises SealingError(truncated) when the receipt has not come.
        """
        self.feed(b"")
        if self._finished is None:
            self._error = SealingError(
                "The response ended before its receipt; ask again for the rest.", code="truncated"
            )
            raise self._error
        return self._finished

    def _feed(self, chunk: bytes) -> list[Event]:
        self._received += len(chunk)
        if self._received > MAX_RESPONSE_BYTES:
            refuse("record_too_large", "A sealed response is at most 64 MiB.")
        if len(self._pending) + len(chunk) < self._need and self._finished is None:
            self._pending += chunk
            return []
        data = bytes(self._pending) + chunk if self._pending else bytes(chunk)
        offset, events = 0, []
        if self._frames is None:
            self._frames = self._open_stream(data[:_OPENING_BYTES])
            offset = _OPENING_BYTES
        size = len(data)
        while offset < size:
            if self._finished is not None:
                refuse("data_after_final", "Bytes came after the receipt.")
            self._need = FRAME_LENGTH_BYTES
            if size - offset >= FRAME_LENGTH_BYTES:
                self._need += frame_length(data, offset)
            if size - offset < self._need:
                break
            frame = data[offset : offset + self._need]
            event = self._take(frame, self._frames.open(frame[FRAME_LENGTH_BYTES:]))
            if event is not None:
                events.append(event)
            offset += len(frame)
        else:
            self._need = FRAME_LENGTH_BYTES
        self._pending = bytearray(data[offset:])
        return events

    def _open_stream(self, opening: bytes) -> FrameOpener:
        prefix = parse_prefix(opening)
        secrets = self._secrets
        if prefix.job_id != secrets.header.job_id or prefix.req_hash != secrets.req_hash:
            refuse("wrong_job", "The response answers another request.")
        mine = secrets.by_key_id.get(prefix.key_id)
        if mine is None or prefix.key_id not in self._attested:
            refuse("unknown_key", "The response is by an enclave that the request was not for.")
        prefix_hash = sha256(opening[:PREFIX_BYTES])
        dh = hpke.x25519(mine.eph_sk, prefix.resp_eph_pk)
        key = response_key(prefix_hash, mine.response_export, dh)
        self._prefix = prefix
        self._hash.update(opening)
        rule = response_rule(secrets.header.profile)
        return FrameOpener(key, opening[PREFIX_BYTES:], aad=prefix_hash, rule=rule)

    def _take(self, frame: bytes, record: Record) -> Event | None:
        kind = record.kind
        if kind is RecordType.RECEIPT:
            return self._finish(record)
        if record.final:
            refuse("no_receipt", "The response ended without a receipt.")
        self._hash.update(frame)
        if kind is RecordType.PAD:
            if record.content:
                refuse("bad_padding", "A pad record holds nothing.")
            return None
        if kind is RecordType.PART:
            self._parts += record.content
            if len(self._parts) > MAX_OBJECT_BYTES:
                refuse("record_too_large", "An object of the response is over 1 MiB.")
            return None
        content = record.content
        if self._parts:
            content = bytes(self._parts) + content
            self._parts.clear()
        if kind is RecordType.DATA:
            self._output.update(content)
            return Data(content)
        if kind in self._once:
            refuse("bad_tag", "A response has at most one usage and one error record.")
        self._once.add(kind)
        return Usage(content) if kind is RecordType.USAGE else ErrorRecord(content)

    def _finish(self, record: Record) -> Finished:
        if not record.final or self._parts:
            refuse("bad_tag", "The receipt came before the response was whole.")
        if len(record.content) != RECEIPT_BYTES or self._prefix is None:
            refuse("no_receipt", "The response ended without a receipt of this version.")
        key_id = self._prefix.key_id
        receipt = verify_receipt(record.content, self._attested[key_id])
        check_receipt(
            receipt, self._secrets, key_id=key_id, resp_hash=self._hash.digest(),
            output_commit=self._output.digest(), quote_id=self._quote_id, epoch=self._epoch,
        )  # fmt: skip
        self._finished = Finished(receipt, record.content)
        return self._finished


def check_receipt(
    receipt: Receipt,
    secrets: RequestSecrets,
    *,
    key_id: bytes,
    resp_hash: bytes,
    output_commit: bytes,
    quote_id: bytes | None,
    epoch: int | None,
) -> None:
    """Compare every field of a verified receipt that the client can know.

    Raises SealingError(receipt_mismatch) with the field's name as `param`.
    """
    header = secrets.header
    equal: tuple[tuple[str, object, object], ...] = (
        ("job_id", receipt.job_id, header.job_id),
        ("key_id", receipt.key_id, key_id),
        ("model_id", receipt.model_id, header.model_id),
        ("suite", receipt.suite, header.suite),
        ("req_hash", receipt.req_hash, secrets.req_hash),
        ("resp_hash", receipt.resp_hash, resp_hash),
        ("prompt_commit", receipt.prompt_commit, secrets.prompt_commit),
        ("output_commit", receipt.output_commit, output_commit),
        ("quote_id", receipt.quote_id, receipt.quote_id if quote_id is None else quote_id),
        ("epoch", receipt.epoch, receipt.epoch if epoch is None else epoch),
    )
    counts = (
        ("input_tokens", receipt.input_tokens, header.max_input_tokens),
        ("cached_input_tokens", receipt.cached_input_tokens, receipt.input_tokens),
        ("output_tokens", receipt.output_tokens, header.max_output_tokens),
        ("reasoning_tokens", receipt.reasoning_tokens, receipt.output_tokens),
    )
    wrong = [name for name, actual, expected in equal if actual != expected]
    wrong += [
        name for name, count, bound in counts if not is_public_count(header.profile, count, bound)
    ]
    if receipt.price_nanoton > header.max_price_nanoton:
        wrong.append("price_nanoton")
    if wrong:
        refuse(
            "receipt_mismatch",
            f"The receipt's {wrong[0]} is not this job's; do not pay it.",
            param=wrong[0],
        )
