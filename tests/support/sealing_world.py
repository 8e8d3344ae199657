"""One client, three enclaves and their keys, made from counted bytes: the sealing tests' world."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nacl.signing import SigningKey

from cocoon.sealing import (
    KeyRing,
    OpenedRequest,
    Profile,
    Recipient,
    RequestHeader,
    ResponseOpener,
    ResponseSealer,
    SealedRequest,
    Status,
    key_id,
    open_request,
    pack_flags,
    seal_request,
)

NOW_MS = 1_790_000_000_000
NOT_AFTER_MS = NOW_MS + 60_000
POLICY = hashlib.sha256(b"policy").digest()
MODEL = hashlib.sha256(b"model").digest()
QUOTE = hashlib.sha256(b"quote").digest()
EVIDENCE = hashlib.sha256(b"evidence").digest()
JOB = bytes(range(16))
BODY = b'{"messages":[{"content":"hi","role":"user"}]}'
USAGE = b'{"completion_tokens":3,"prompt_tokens":5,"total_tokens":8}'


class Counted:
    """Deterministic randomness: the SHA-256 of a seed and a counter."""

    def __init__(self, seed: str = "seed") -> None:
        self._seed = seed.encode()
        self._count = 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._seed + self._count.to_bytes(4, "big")).digest(size)


SECRETS = tuple(Counted(f"enclave {index}").token(32) for index in range(3))
SIGNER = SigningKey(Counted("signer").token(32))
SIGN_PK = bytes(SIGNER.verify_key)


def ring(*indexes: int) -> KeyRing:
    held = KeyRing()
    for index in indexes:
        held.add(SECRETS[index])
    return held


def recipients(count: int = 3) -> list[Recipient]:
    return [Recipient.of(KeyRing().add(secret)) for secret in SECRETS[:count]]


def header(*, profile: Profile = Profile.P0, stream: bool = False) -> RequestHeader:
    return RequestHeader(
        job_id=JOB, model_id=MODEL, max_price_nanoton=1_000_000, max_input_tokens=4096,
        max_output_tokens=1024, not_after_ms=NOT_AFTER_MS, policy_hash=POLICY,
        flags=pack_flags(profile, stream=stream),
    )  # fmt: skip


def sealed(
    *, profile: Profile = Profile.P0, stream: bool = False, body: bytes = BODY, count: int = 3,
    endpoint: str = "/v1/chat/completions", seed: str = "client",
) -> SealedRequest:  # fmt: skip
    return seal_request(
        header=header(profile=profile, stream=stream), recipients=recipients(count),
        endpoint=endpoint, body=body, randomness=Counted(seed),
    )  # fmt: skip


def opened(envelope: bytes, *, index: int = 1, seed: str = "enclave") -> OpenedRequest:
    return open_request(
        envelope, keys=ring(index), resp_eph_sk=Counted(seed).token(32), now_ms=NOW_MS,
        policy_hashes={POLICY}, model_ids={MODEL},
    )  # fmt: skip


RECEIPT_FIELDS = {
    "status": Status.COMPLETE, "epoch": 7, "quote_id": QUOTE, "input_tokens": 64,
    "cached_input_tokens": 0, "output_tokens": 64, "reasoning_tokens": 0, "price_nanoton": 700,
    "opened_ms": NOW_MS + 1, "first_ms": NOW_MS + 2, "last_ms": NOW_MS + 3,
    "evidence_id": EVIDENCE, "seq": 0, "prev_receipt_hash": bytes(32),
}  # fmt: skip


def signed_receipt(sealer: ResponseSealer, **changes: object) -> bytes:
    """A receipt for what was sealed so far; fields that the sealer fills in can be changed too."""
    fields = {name: changes.pop(name, value) for name, value in RECEIPT_FIELDS.items()}
    receipt = sealer.receipt(**fields)  # type: ignore[arg-type]
    return replace(receipt, **changes).sign(SIGNER)  # type: ignore[arg-type]


def respond(request: OpenedRequest, contents: Iterable[bytes], **changes: object) -> list[bytes]:
    """A whole response, one list item per frame (the first holds rh and the stream's header)."""
    sealer = ResponseSealer(request)
    pieces = [sealer.prefix(), *(sealer.data(content) for content in contents)]
    pieces.append(sealer.usage(USAGE))
    pieces.append(sealer.finish(signed_receipt(sealer, **changes)))
    return [pieces[0], *(frame for piece in pieces[1:] for frame in frames(piece))]


def frames(data: bytes) -> Iterator[bytes]:
    """Cut sealed bytes at their frames."""
    offset = 0
    while offset < len(data):
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        yield data[offset:end]
        offset = end


def opener(request: SealedRequest, *, index: int = 1, **known: object) -> ResponseOpener:
    attested = {key_id(KeyRing().add(SECRETS[index])): SIGN_PK}
    return ResponseOpener(request.secrets, attested, **known)  # type: ignore[arg-type]
