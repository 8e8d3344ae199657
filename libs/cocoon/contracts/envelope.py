"""The envelope around an event: as proposed to the log, as stored, as CloudEvents headers.

hash = SHA-256(prev_hash || UTF-8 of the fields of `hashed_text`, joined by newlines). Every field
but `data`, which comes last, is free of newlines, so the text is unambiguous. `traceparent` is
stored but not hashed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cocoon.contracts.events import EventData, decode_event

GENESIS_HASH = bytes(32)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that a decision proposes: the stream that it extends and its data."""

    stream: str
    data: EventData


@dataclass(frozen=True, slots=True)
class AppendItem:
    """One command's outcome, appended whole or not at all.

    `expects` names the streams (with the version seen; 0 = must not exist) whose growth would
    falsify the decision. `command` is canonical JSON with the content-free inputs of the decision.
    """

    command_id: str
    command: bytes
    actor: str
    correlation_id: str
    expects: tuple[tuple[str, int], ...]
    events: tuple[NewEvent, ...]
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One row of the log."""

    shard: int
    position: int  # dense from 1
    stream: str  # "<aggregate>/<id>"
    version: int  # dense from 1 per stream
    type: str
    schema_version: int
    event_id: str
    causation_id: str  # the command id
    correlation_id: str  # the job id, or the stream's id
    actor: str
    recorded_at_us: int
    data: bytes
    prev_hash: bytes
    hash: bytes
    traceparent: str = field(default="", compare=False)
    decoded: EventData | None = field(default=None, compare=False, repr=False)

    def decode(self) -> EventData:
        """The typed data (newest version), parsed once."""
        if self.decoded is None:
            data = decode_event(self.type, self.schema_version, self.data)
            object.__setattr__(self, "decoded", data)
            return data
        return self.decoded

    def hashed_text(self) -> bytes:
        """What the chain hashes after the previous hash."""
        head = (
            f"{self.shard}\n{self.position}\n{self.stream}\n{self.version}\n{self.type}\n"
            f"{self.schema_version}\n{self.event_id}\n{self.causation_id}\n{self.correlation_id}\n"
            f"{self.actor}\n{self.recorded_at_us}\n"
        )
        return head.encode() + self.data

    def compute_hash(self) -> bytes:
        return hashlib.sha256(self.prev_hash + self.hashed_text()).digest()

    def to_headers(self) -> dict[str, str]:
        """CloudEvents 1.0 binary-mode headers; the message body is `data` unchanged."""
        return {
            "ce-specversion": "1.0",
            "ce-id": self.event_id,
            "ce-source": f"cocoon/{self.actor}",
            "ce-type": self.type,
            "ce-schemaversion": str(self.schema_version),
            "ce-subject": self.stream,
            "ce-streamversion": str(self.version),
            "ce-shard": str(self.shard),
            "ce-position": str(self.position),
            "ce-prevhash": self.prev_hash.hex(),
            "ce-hash": self.hash.hex(),
            "ce-time": str(self.recorded_at_us),
            "ce-causationid": self.causation_id,
            "ce-correlationid": self.correlation_id,
            "ce-actor": self.actor,
            "traceparent": self.traceparent,
        }

    @staticmethod
    def from_message(headers: dict[str, str], body: bytes) -> StoredEvent:
        """Rebuild the row from a bus message. Raises KeyError or ValueError if it is malformed."""
        event = StoredEvent(
            shard=int(headers["ce-shard"]),
            position=int(headers["ce-position"]),
            stream=headers["ce-subject"],
            version=int(headers["ce-streamversion"]),
            type=headers["ce-type"],
            schema_version=int(headers["ce-schemaversion"]),
            event_id=headers["ce-id"],
            causation_id=headers["ce-causationid"],
            correlation_id=headers["ce-correlationid"],
            actor=headers["ce-actor"],
            recorded_at_us=int(headers["ce-time"]),
            data=body,
            prev_hash=bytes.fromhex(headers["ce-prevhash"]),
            hash=bytes.fromhex(headers["ce-hash"]),
            traceparent=headers.get("traceparent", ""),
        )
        if event.compute_hash() != event.hash:
            raise ValueError(f"event {event.position} does not match its hash")
        return event
