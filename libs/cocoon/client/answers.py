"""OpenAI's JSON on its way to the caller: what a stream may show early and what waits.

Pure. The last content, the usage and the whole body leave only with a checked receipt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from cocoon.client.checks import refuse_answer
from cocoon.contracts.messages import Dispute
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    RateLimited,
    Unavailable,
)
from cocoon.sealing import Receipt, Status

SSE_DONE: Final = b"data: [DONE]\n\n"
_NO_LINE_ENDS: Final = bytes.maketrans(b"\r\n", b"  ")
_BY_TYPE: Final[dict[str, type[CocoonError]]] = {
    cls.openai_type: cls
    for cls in (
        BadRequest, Conflict, DeadlineExceeded, Forbidden, NotFound, RateLimited, Unavailable,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a checked answer cost and by whom it was given."""

    job_id: str
    provider_id: str
    model_id: str
    assurance: str
    receipt: Receipt
    receipt_raw: bytes = field(repr=False)
    dispute: Dispute | None = None  # the client counted less than the receipt claims

    @property
    def cost_nanoton(self) -> int:
        return self.receipt.price_nanoton

    def to_usage(self) -> dict[str, Any]:
        """The `usage.cocoon` object. The amount is a decimal string, as all amounts in JSON."""
        told = {
            "job_id": self.job_id,
            "provider_id": self.provider_id,
            "model_id": self.model_id,
            "cost_nanoton": str(self.cost_nanoton),
            "assurance": self.assurance,
            "receipt": self.receipt_raw.hex(),
        }
        if self.dispute is None:
            return told
        return {**told, "dispute": self.dispute.model_dump(mode="json", exclude={"receipt"})}


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Shape(msgspec.Struct):
    """The two things that decide when a chunk may leave."""

    choices: list[_Choice] = []
    usage: msgspec.Raw = msgspec.Raw(b"null")


_shape = msgspec.json.Decoder(_Shape)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class StreamShaper:
    """Sorts a stream's objects into those that may be shown now and those that wait."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._held: list[bytes] = []
        self._usage_chunk: bytes | None = None
        self._last: bytes = b"{}"

    def take(self, content: bytes) -> bytes | None:
        """Return the object if it may be shown now. What follows a finish reason waits too."""
        try:
            shape = _shape.decode(content)
            if not content.isascii():
                content.decode("utf-8")  # the decoder skips what it does not look for
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            refuse_answer("bad_answer", "a part of it is not a chat completion chunk")
        if not shape.choices and bytes(shape.usage) != b"null":
            self._usage_chunk = content
            return None
        self._last = content
        if self._held or any(choice.finish_reason is not None for choice in shape.choices):
            self._held.append(content)
            return None
        return content

    def finish(self, settlement: Settlement, usage: bytes | None) -> list[bytes]:
        """What a checked receipt sets free: the held objects, then usage where it was asked."""
        if not self._include_usage:
            return self._held
        chunk: dict[str, Any] = _fields(self._usage_chunk or self._last)
        if self._usage_chunk is None:
            chunk["choices"] = []
        else:
            usage = bytes(chunk["usage"])
        chunk["usage"] = {**_fields(usage or b"{}"), "cocoon": settlement.to_usage()}
        return [*self._held, msgspec.json.encode(chunk)]


def whole_body(content: bytes, settlement: Settlement) -> bytes:
    """The one body, with `usage.cocoon` added. Raises EvidenceRejected(bad_answer)."""
    body: dict[str, Any] = _fields(content)
    usage = bytes(body.get("usage", b""))
    told = _fields(usage) if usage.startswith(b"{") else {}
    body["usage"] = {**told, "cocoon": settlement.to_usage()}
    return msgspec.json.encode(body)


def _fields(content: bytes) -> dict[str, msgspec.Raw]:
    """An object's fields as they are written, if all of it is JSON that everybody reads."""
    try:
        msgspec.json.decode(content)  # the other decoder skips over what is in the fields
        return _raw_fields.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        refuse_answer("bad_answer", "it is not JSON, or no object")


def sse_event(content: bytes) -> bytes:
    """One server-sent event. Line ends in JSON stand between its words: blanks say the same."""
    if b"\n" in content or b"\r" in content:
        content = content.translate(_NO_LINE_ENDS)
    return b"data: " + content + b"\n\n"


def enclave_error(receipt: Receipt, record: bytes | None) -> CocoonError | None:
    """The error that a job ended with, from its sealed error record and checked receipt.

    None for an answer. A cancelled job's error says what was charged.
    """
    if record is not None:
        return _told_error(record, receipt)
    if receipt.status is Status.CANCELLED:
        return Conflict(
            f"The job was cancelled; {receipt.price_nanoton} nanoTON were charged for what had "
            "been made.",
            code="cancelled",
        )
    if receipt.status in (Status.REFUSED, Status.FAILED):
        return Unavailable("The provider could not answer; nothing was charged.", code="job_failed")
    return None


def _told_error(record: bytes, receipt: Receipt) -> CocoonError:
    default = BadRequest if receipt.status is Status.REFUSED else Unavailable
    try:
        told = json.loads(record)["error"]
        cls = _BY_TYPE.get(told.get("type"), default)
        message, code, param = (told.get(name) for name in ("message", "code", "param"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return default("The provider answered with an error that cannot be read.")
    return cls(
        _shown(str(message))[:1000],
        code=_shown(code)[:128] if isinstance(code, str) else None,
        param=_shown(param)[:128] if isinstance(param, str) else None,
    )


def _shown(text: str) -> str:
    """Text that can be written again: JSON may hold halves of characters, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
