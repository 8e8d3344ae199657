"""CAI/1's parsers under fire: only SealingError may leave them, and what they take writes itself.

Mutated ciphertext never passes the AEAD, so the targets named `*_records` seal the fuzzer's own
records under known keys: what a hostile client or enclave could send inside its seal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from nacl.bindings import (
    crypto_secretstream_xchacha20poly1305_init_push,
    crypto_secretstream_xchacha20poly1305_push,
    crypto_secretstream_xchacha20poly1305_state,
)

from cocoon.kernel.errors import SealingError
from cocoon.sealing import (
    INSIDE_CODES,
    Data,
    ErrorRecord,
    Event,
    Finished,
    OpenedRequest,
    Profile,
    Receipt,
    ResponseOpener,
    ResponsePrefix,
    SealedRequest,
    Usage,
    key_id,
    open_request,
    parse_header,
    parse_prefix,
    verify_bundle,
    verify_receipt,
)
from cocoon.sealing.derive import (
    OUTPUT_LABEL,
    commit,
    request_keys,
    response_key,
    sha256,
)
from cocoon.sealing.keys import BUNDLE_BYTES
from cocoon.sealing.padding import RecordType
from cocoon.sealing.receipt import BODY_BYTES, RECEIPT_BYTES
from tests.support import sealing_world as world

SIGN_RECEIPT = 0x80  # a record's tag with this bit: the target puts an honest receipt there
FINAL = 3


class Sealed(NamedTuple):
    """One honest request under each profile, opened: where the targets take their keys."""

    request: SealedRequest
    opened: OpenedRequest
    header_bytes: bytes


class Piece(NamedTuple):
    """One record of a script: its secretstream tag, its bytes, and whether to sign instead."""

    tag: int
    record: bytes
    receipt: bool


@cache
def sealed(profile: Profile) -> Sealed:
    stream = profile is not Profile.P0
    request = world.sealed(profile=profile, stream=stream, count=2)
    _, size = parse_header(request.envelope)
    return Sealed(request, world.opened(request.envelope), request.envelope[:size])


def refused_well(error: SealingError) -> None:
    """A refusal has a code that the protocol lists, and a sentence without the input."""
    assert error.code in INSIDE_CODES, error.code
    assert len(error.message) < 200


def pieces_of(script: bytes) -> Iterator[Piece]:
    """A script is records of tag u8, length u16, bytes; the last may be cut short."""
    at = 0
    while at < len(script):
        tag, length = script[at], int.from_bytes(script[at + 1 : at + 3], "big")
        yield Piece(tag & FINAL, script[at + 3 : at + 3 + length], bool(tag & SIGN_RECEIPT))
        at += 3 + length


def script_of(*pieces: tuple[int, bytes]) -> bytes:
    """The script of (tag, record) pairs: what `pieces_of` reads."""
    return b"".join(b"%c%b%b" % (t, len(r).to_bytes(2, "big"), r) for t, r in pieces)


def record(kind: RecordType, content: bytes, size: int = 0) -> bytes:
    """A record as an honest sealer lays it out, padded to `size`."""
    return (b"%c%b%b" % (kind, len(content).to_bytes(2, "big"), content)).ljust(size, b"\0")


class Sealer:
    """libsodium's stream without any of our rules: it seals whatever it is given."""

    def __init__(self, key: bytes, aad: bytes) -> None:
        self._state = crypto_secretstream_xchacha20poly1305_state()
        self.header = crypto_secretstream_xchacha20poly1305_init_push(self._state, key)
        self._aad = aad

    def frame(self, record_bytes: bytes, tag: int) -> bytes:
        sealed_bytes = crypto_secretstream_xchacha20poly1305_push(
            self._state, record_bytes, self._aad, tag
        )
        return len(sealed_bytes).to_bytes(4, "big") + sealed_bytes


def content_of(record_bytes: bytes) -> bytes:
    return record_bytes[3 : 3 + int.from_bytes(record_bytes[1:3], "big")]


def open_envelope(envelope: bytes) -> OpenedRequest:
    return open_request(
        envelope, keys=world.ring(0, 1), resp_eph_sk=world.Counted("fuzz").token(32),
        now_ms=world.NOW_MS, policy_hashes={world.POLICY}, model_ids={world.MODEL},
    )  # fmt: skip


def request_envelope(data: bytes) -> None:
    """Header, then the whole way in: whatever is accepted re-encodes to the same header."""
    try:
        header, size = parse_header(data)
        assert header.encode() == data[:size], "the header has a second form"
        assert header.flags < 1 << 6, "a flag that nobody knows"
        open_envelope(data)
    except SealingError as error:
        refused_well(error)


def request_records(data: bytes) -> None:
    """Records that a hostile client seals properly: refused, or exactly the content it meant."""
    profile = Profile(data[0] & 3) if data else Profile.P0
    known = sealed(profile)
    header_hash = sha256(known.header_bytes)
    stream_key, _ = request_keys(header_hash, world.Counted("client").token(32))
    sealer = Sealer(stream_key, header_hash)
    pieces = list(pieces_of(data[1:]))
    frames = [sealer.frame(piece.record, piece.tag) for piece in pieces]
    try:
        opened = open_envelope(b"".join((known.header_bytes, sealer.header, *frames)))
    except SealingError as error:
        refused_well(error)
        return
    _padded_well(pieces, {RecordType.DATA})
    said = b"".join(content_of(piece.record) for piece in pieces)
    assert opened.endpoint.encode() + b"\0" + opened.body == said
    assert [piece.tag for piece in pieces] == [0] * (len(pieces) - 1) + [FINAL]


def _padded_well(pieces: list[Piece], kinds: set[RecordType]) -> None:
    """What was accepted holds these kinds and empty pads, and nothing behind its content."""
    for piece in pieces:
        content = content_of(piece.record)
        kind = piece.record[0]
        assert kind in kinds or (kind == RecordType.PAD and not content)
        assert not piece.record[3 + len(content) :].strip(b"\0")


def response_prefix(data: bytes) -> None:
    try:
        prefix = parse_prefix(data)
    except SealingError as error:
        refused_well(error)
        return
    assert prefix.encode() == data[:104], "the prefix has a second form"


def response_bytes(data: bytes) -> None:
    """A response without keys, cut in two: an error that stays, and the same one in one piece."""
    cut = data[0] if data else 0
    whole, halves = new_opener(Profile.P2), new_opener(Profile.P2)
    codes = [fed(whole, [data[1:]]), fed(halves, [data[1 : 1 + cut], data[1 + cut :]])]
    assert codes[0][1] == codes[1][1] != "", "nobody can answer without the keys"
    assert whole.received_bytes <= len(data)


def new_opener(profile: Profile) -> ResponseOpener:
    known = sealed(profile).request
    attested = {key_id(recipient.x25519_pk): world.SIGN_PK for recipient in world.recipients(2)}
    return ResponseOpener(known.secrets, attested)


def fed(opener: ResponseOpener, chunks: list[bytes]) -> tuple[list[Event], str]:
    """The events of a response fed in these chunks, and the code that it was refused with."""
    events: list[Event] = []
    try:
        for chunk in chunks:
            events += opener.feed(chunk)
        opener.close()
    except SealingError as error:
        refused_well(error)
        return events, error.code
    return events, ""


def response_records(data: bytes) -> None:
    """Records that a hostile enclave seals properly; however they are cut, the same is read."""
    profile = Profile(data[0] & 3) if data else Profile.P2
    pieces = list(pieces_of(data[1:]))
    frames, said = sealed_response(profile, pieces)
    whole = b"".join(frames)
    events, code = fed(new_opener(profile), [whole])
    per_frame, code_per_frame = fed(new_opener(profile), frames)
    cut = len(data) % (len(whole) + 1)
    halves, code_of_halves = fed(new_opener(profile), [whole[:cut], whole[cut:]])
    assert code == code_per_frame == code_of_halves
    if code == "":
        assert events == per_frame == halves
        _padded_well(pieces[:-1], set(RecordType) - {RecordType.PAD, RecordType.RECEIPT})
        assert isinstance(events[-1], Finished)
        assert len(pieces) == 1 or pieces[-2].record[0] != RecordType.PART, "cut short"
        assert b"".join(event.content for event in events if isinstance(event, Data)) == said
        assert sum(isinstance(event, Usage) for event in events) <= 1
        assert sum(isinstance(event, ErrorRecord) for event in events) <= 1


def sealed_response(profile: Profile, pieces: list[Piece]) -> tuple[list[bytes], bytes]:
    """The frames of a response made of these records, and the content of its data."""
    opened = sealed(profile).opened
    prefix = ResponsePrefix(
        opened.header.job_id, opened.slot.key_id, opened.req_hash, opened.resp_eph_pk
    ).encode()
    secret, prefix_hash = opened.response_secret, sha256(prefix)
    key = response_key(prefix_hash, secret.response_export, secret.ephemeral_dh)
    sealer = Sealer(key, prefix_hash)
    frames, parts, said = [prefix + sealer.header], b"", b""
    for piece in pieces:
        if piece.receipt:
            raw = honest_receipt(opened, b"".join(frames), said)
            size = 0 if profile is Profile.P3 else 512
            frames.append(sealer.frame(record(RecordType.RECEIPT, raw, size), piece.tag))
            continue
        kind, content = piece.record[:1], content_of(piece.record)
        if kind == b"\x05":
            parts += content
        elif kind != b"\x03":
            said += parts + content if kind == b"\x00" else b""
            parts = b""
        frames.append(sealer.frame(piece.record, piece.tag))
    return frames, said


def honest_receipt(opened: OpenedRequest, so_far: bytes, said: bytes) -> bytes:
    return Receipt(
        job_id=opened.header.job_id, key_id=opened.slot.key_id, model_id=opened.header.model_id,
        req_hash=opened.req_hash, resp_hash=sha256(so_far), prompt_commit=opened.prompt_commit,
        output_commit=commit(opened.commit_key, OUTPUT_LABEL, said),
        **world.RECEIPT_FIELDS,  # type: ignore[arg-type]
    ).sign(world.SIGNER)  # fmt: skip


def receipt(data: bytes) -> None:
    """A receipt, and the first 356 bytes signed by the fuzzer's own key: never two forms."""
    honest = data[:BODY_BYTES] + bytes(RECEIPT_BYTES - BODY_BYTES)
    if len(data) >= BODY_BYTES:
        signature = world.SIGNER.sign(b"cai/1 receipt\0" + data[:BODY_BYTES]).signature
        honest = data[:BODY_BYTES] + signature
    for raw in (data, honest):
        try:
            found = Receipt.decode(raw)
            assert found.encode_body() == raw[:BODY_BYTES], "the receipt has a second form"
            assert verify_receipt(raw, world.SIGN_PK).sign(world.SIGNER) == raw
        except SealingError as error:
            refused_well(error)


def key_bundle(data: bytes) -> None:
    """A bundle, and its body signed by the attested key: only what `encode_body` writes passes."""
    body = data[: BUNDLE_BYTES - 64]
    honest = body + world.SIGNER.sign(b"cai/1 key bundle\0" + body).signature
    for raw in (data, honest):
        try:
            bundle = verify_bundle(
                raw, ed25519_pk=world.SIGN_PK, evidence_id=world.EVIDENCE, now_ms=world.NOW_MS
            )
        except SealingError as error:
            refused_well(error)
            continue
        assert bundle.sign(world.SIGNER) == raw, "the bundle has a second form"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request_envelope": request_envelope,
    "request_records": request_records,
    "response_prefix": response_prefix,
    "response_bytes": response_bytes,
    "response_records": response_records,
    "receipt": receipt,
    "key_bundle": key_bundle,
}
