"""The JSON and the bus's own forms under fire: canonical JSON, events, commands, messages, chat
requests, headers and frames. What is accepted has one canonical form, and reads back the same."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from nacl.signing import SigningKey
from pydantic import ValidationError

from cocoon.bus.callout import identity_of, read_question
from cocoon.bus.client import BusClient
from cocoon.chat import (
    EmbeddingRequest,
    parse_chat_request,
    parse_completion_request,
    parse_embedding_request,
)
from cocoon.chat.respond import error_body
from cocoon.client.bounds import token_bounds
from cocoon.contracts import messages
from cocoon.contracts.base import Contract
from cocoon.contracts.commands import decode_command
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import ALL_EVENTS, Quote, decode_event
from cocoon.kernel import canonical
from cocoon.kernel.errors import BadRequest, Forbidden
from cocoon.models.manifest import parse as parse_manifest
from cocoon.models.manifest import parse_published
from services.gateway.frames import HEAD_BYTES, LAST_HEAD_BYTES, parse_frame
from services.provider.backends.triton_wire import request_text
from services.provider.frames import encode
from services.provider.jobs import Dispatch

CALLOUT_SERVER = SigningKey(bytes(range(32)))  # of no server; a seed's claims name it
MESSAGES: tuple[type[Contract], ...] = tuple(
    item
    for item in vars(messages).values()
    if isinstance(item, type)
    and issubclass(item, Contract)
    and item.__module__ == messages.__name__
)


def canonical_json(data: bytes) -> None:
    """Strict or not at all; and what is read leniently has one canonical form, or none."""
    with contextlib.suppress(ValueError):
        assert canonical.dumps(canonical.loads(data)) == data
    try:
        value = canonical.loads(data, strict=False)
        text = canonical.dumps(value)
    except ValueError:
        return
    assert canonical.loads(text) == value
    assert json.loads(text) == value


def _same_again(found: Contract) -> None:
    """A model's canonical form reads back as the same model."""
    text = found.to_canonical()
    assert type(found).model_validate_json(text) == found
    assert canonical.loads_object(text) == json.loads(text)


def event(data: bytes) -> None:
    """The same bytes as every event of every version."""
    for cls in ALL_EVENTS:
        try:
            found = decode_event(cls.event_type, cls.schema_version, data)
        except ValidationError as error:
            _says_no_value(error)
            continue
        _same_again(found)


def model_manifest(data: bytes) -> None:
    """One model, one id; and no file of it lies outside the folder."""
    try:
        found = parse_manifest(data)
    except ValueError:
        return
    with contextlib.suppress(ValueError):
        assert parse_published(data, hashlib.sha256(data).hexdigest()).to_canonical() == data
    again = parse_manifest(found.to_canonical())
    assert (again, again.model_id) == (found, found.model_id)
    for file in found.files:
        steps = file.path.split("/")
        assert not {"", ".", ".."} & set(steps)
        assert file.path.isascii()
        assert file.path.isprintable()


def command(data: bytes) -> None:
    """A stored command writes itself again, byte for byte once it is canonical."""
    try:
        found = decode_command(data)
    except (KeyError, ValueError):
        return
    stored = found.to_stored()
    again = decode_command(stored)
    assert again == found
    assert again.to_stored() == stored


def message(data: bytes) -> None:
    """The same bytes as every message of the bus, and as a quote."""
    for cls in (*MESSAGES, Quote):
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            _says_no_value(error)
            continue
        _same_again(found)


def _says_no_value(error: ValidationError) -> None:
    assert "input_value" not in str(error)


def stored_event(data: bytes) -> None:
    """A message of the log: its headers up to an empty line, then the event's bytes."""
    block, _, body = data.partition(b"\r\n\r\n")
    try:
        found = StoredEvent.from_message(BusClient._parse_header_lines(block), body)
    except (KeyError, ValueError):
        return
    assert found.compute_hash() == found.hash
    assert StoredEvent.from_message(found.to_headers(), body) == found


def bus_headers(data: bytes) -> None:
    """A message's header block as the server passes it on: whoever may publish wrote it."""
    reading = BusClient()._process_headers(data)
    try:
        reading.send(None)
    except StopIteration as done:
        found: dict[str, str] | None = done.value
    else:
        raise AssertionError("reading headers waits for nothing")
    assert all(isinstance(text, str) for pair in (found or {}).items() for text in pair)
    try:
        Dispatch.read(found or {})
    except ValueError:
        return


def token_frame(data: bytes) -> None:
    """A frame as the gateway reads it is one that a provider writes."""
    frame = parse_frame("prov", 1, data)
    if frame is None:
        return
    head = LAST_HEAD_BYTES if frame.last else HEAD_BYTES
    assert len(data) == head + len(frame.data)
    assert encode(int(frame.last), frame.offset, frame.data, frame.blob_hash or b"") == data
    assert not frame.last or frame.total == frame.offset + len(frame.data)


def chat_request(data: bytes) -> None:
    """Refused in a sentence that can be sent, or passed on to an engine unchanged."""
    try:
        found = parse_chat_request(data)
    except BadRequest as error:
        told = error_body(error)
        assert len(told) < 2000, "a refusal repeats the request"
        return
    assert math.isfinite(found.temperature or 0.0)
    again = parse_chat_request(request_text(found))
    left_out = ("metadata", "safety_identifier", "service_tier", "stream", "stream_options", "user")
    assert again == found.model_copy(update=dict.fromkeys(left_out))


def completion_request(data: bytes) -> None:
    """As a chat's."""
    try:
        found = parse_completion_request(data)
    except BadRequest as error:
        told = error_body(error)
        assert len(told) < 2000, "a refusal repeats the request"
        return
    assert math.isfinite(found.temperature or 0.0)
    again = parse_completion_request(request_text(found))
    left_out = ("stream", "stream_options", "user")
    assert again == found.model_copy(update=dict.fromkeys(left_out))


def embedding_request(data: bytes) -> None:
    """Refused in a sentence that can be sent, or within bounds that cover every text."""
    try:
        found = parse_embedding_request(data)
    except BadRequest as error:
        told = error_body(error)
        assert len(told) < 2000, "a refusal repeats the request"
        return
    assert isinstance(found, EmbeddingRequest)
    bounds = token_bounds(found, 2**30)
    assert bounds.max_input_tokens >= sum(len(text.encode()) for text in found.texts) > 0
    assert bounds.max_output_tokens == 0


def callout(data: bytes) -> None:
    """A question about a connection, as whoever connects can shape it: inside, signed or not."""
    with contextlib.suppress(ValueError):
        read_question(data)
    head = base64.urlsafe_b64encode(b'{"typ":"JWT","alg":"ed25519-nkey"}').rstrip(b"=")
    signed = head + b"." + base64.urlsafe_b64encode(data).rstrip(b"=")
    signature = base64.urlsafe_b64encode(CALLOUT_SERVER.sign(signed).signature).rstrip(b"=")
    try:
        question = read_question(signed + b"." + signature)
    except ValueError:
        return
    try:
        identity_of(question)
    except Forbidden as error:
        told = error.message
        assert len(told) < 200, "a refusal repeats the question"


TARGETS: dict[str, Callable[[bytes], Any]] = {
    "canonical_json": canonical_json,
    "event": event,
    "command": command,
    "model_manifest": model_manifest,
    "message": message,
    "stored_event": stored_event,
    "bus_headers": bus_headers,
    "token_frame": token_frame,
    "chat_request": chat_request,
    "completion_request": completion_request,
    "embedding_request": embedding_request,
    "callout": callout,
}
