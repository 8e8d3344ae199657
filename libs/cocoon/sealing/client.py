"""The client's side of a request: seal one prompt to several attested enclaves.

Only the recipients' X25519 keys open it; the gateway, the bus and the operator see the clear
header and sizes. What the client keeps to read the answer never shows in a repr.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from nacl.bindings import crypto_aead_chacha20poly1305_ietf_encrypt

from cocoon.kernel.clock import Randomness
from cocoon.sealing import hpke
from cocoon.sealing.derive import (
    PROMPT_LABEL,
    RESPONSE_LABEL,
    WRAP_LABEL,
    commit,
    hpke_info,
    key_id,
    request_keys,
    sha256,
)
from cocoon.sealing.envelope import (
    MAX_ENVELOPE_BYTES,
    RecipientSlot,
    RequestHeader,
    request_hash,
)
from cocoon.sealing.padding import request_rule
from cocoon.sealing.records import FrameSealer, seal_content
from cocoon.sealing.refusals import refuse

MAX_ENDPOINT_BYTES: Final = 64
# The wrap key is used for one message only, so its nonce can be fixed.
WRAP_NONCE: Final = bytes(12)


@dataclass(frozen=True, slots=True)
class Recipient:
    """An attested enclave's current X25519 key."""

    key_id: bytes
    x25519_pk: bytes

    @classmethod
    def of(cls, x25519_pk: bytes) -> Recipient:
        return cls(key_id(x25519_pk), x25519_pk)


@dataclass(frozen=True, slots=True)
class RecipientSecret:
    """What one recipient's answer needs: the ephemeral secret and HPKE's response export."""

    eph_sk: bytes = field(repr=False)
    response_export: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RequestSecrets:
    """What the client keeps of a request until its answer is checked. Nothing secret prints."""

    header: RequestHeader
    req_hash: bytes
    prompt_commit: bytes
    commit_key: bytes = field(repr=False)
    by_key_id: dict[bytes, RecipientSecret] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SealedRequest:
    """The bytes to send (and to send again on a retry) and the secrets to keep."""

    envelope: bytes = field(repr=False)
    secrets: RequestSecrets


def join_content(endpoint: str, body: bytes) -> bytes:
    """The request's content: endpoint, a zero byte, the body. Raises SealingError(bad_request)."""
    name = endpoint.encode("ascii", "replace")
    if not 1 <= len(name) <= MAX_ENDPOINT_BYTES or not endpoint.isascii() or b"\x00" in name:
        refuse("bad_request", "An endpoint is 1 to 64 ASCII characters.", param="endpoint")
    return name + b"\x00" + body


def _wrap(
    recipient: Recipient, cek: bytes, info: bytes, eph_sk: bytes
) -> tuple[RecipientSlot, RecipientSecret]:
    if key_id(recipient.x25519_pk) != recipient.key_id:
        refuse("bad_key", "A recipient's key id is not its key's; refresh the directory.")
    enc, context = hpke.setup_sender(recipient.x25519_pk, info, eph_sk=eph_sk)
    wrapped = crypto_aead_chacha20poly1305_ietf_encrypt(
        cek, recipient.key_id + enc, WRAP_NONCE, context.export(WRAP_LABEL, 32)
    )
    secret = RecipientSecret(eph_sk, context.export(RESPONSE_LABEL, 32))
    return RecipientSlot(recipient.key_id, enc, wrapped), secret


def seal_request(
    *,
    header: RequestHeader,
    recipients: Sequence[Recipient],
    endpoint: str,
    body: bytes,
    randomness: Randomness,
) -> SealedRequest:
    """Seal an OpenAI request body (UTF-8 JSON) for 1 to 8 enclaves.

    `header` carries every clear field and no recipients yet. Raises SealingError: bad_request,
    bad_key, bad_suite, record_too_large (an envelope over 8 MiB).
    """
    content = join_content(endpoint, body)
    if len(content) > MAX_ENVELOPE_BYTES:
        refuse("record_too_large", "A sealed request is at most 8 MiB; send less.")
    cek = randomness.token(32)
    info = hpke_info(header.encode_fixed(len(recipients)))
    wraps = [_wrap(recipient, cek, info, randomness.token(32)) for recipient in recipients]
    full = replace(header, recipients=tuple(slot for slot, _ in wraps))
    header_bytes = full.encode()
    header_hash = sha256(header_bytes)
    stream_key, commit_key = request_keys(header_hash, cek)
    rule = request_rule(full.profile)
    sealer = FrameSealer(stream_key, aad=header_hash, rule=rule)
    frames = seal_content(sealer, rule, content, final=True)
    envelope = b"".join((header_bytes, sealer.header, *frames))
    if len(envelope) > MAX_ENVELOPE_BYTES:
        refuse("record_too_large", "A sealed request is at most 8 MiB; send less.")
    secrets = RequestSecrets(
        header=full,
        req_hash=request_hash(envelope),
        prompt_commit=commit(commit_key, PROMPT_LABEL, content),
        commit_key=commit_key,
        by_key_id={slot.key_id: secret for slot, secret in wraps},
    )
    return SealedRequest(envelope, secrets)
