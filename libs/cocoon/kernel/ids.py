"""Typed ids. Each is a string with a fixed form, made from injected randomness."""

from __future__ import annotations

import base64
import hashlib
import re
import uuid
from typing import NewType

JobId = NewType("JobId", str)  # 32 lower-case hex digits (16 random bytes, drawn by the client)
AccountId = NewType("AccountId", str)  # "acct_" + 16 hex
ProviderId = NewType("ProviderId", str)  # "prov_" + 32 hex, from the agent's identity key
ApiKeyId = NewType("ApiKeyId", str)  # "key_" + 12 hex; the public name of an API key
ModelId = NewType("ModelId", str)  # 64 hex: SHA-256 of the model's manifest
GatewayId = NewType("GatewayId", str)  # "gw" + 12 hex, from the gateway's identity key

# An API key's text as the gateway takes it: "ck_" + 32 random bytes in base64url
API_KEY_FORM = r"ck_[A-Za-z0-9_-]{43}"
_API_KEY = re.compile(API_KEY_FORM + r"\Z")
_JOB = re.compile(r"[0-9a-f]{32}\Z")
NAMESPACE = uuid.UUID("6f1c2f0e-0c61-5d0b-9a53-434149310001")
_NAMESPACE_BYTES = NAMESPACE.bytes


def job_id(raw: bytes) -> JobId:
    """Return the id for 16 raw bytes. Raises ValueError for another length."""
    if len(raw) != 16:
        raise ValueError("a job id is 16 bytes")
    return JobId(raw.hex())


def is_job_id(text: str) -> bool:
    return _JOB.match(text) is not None


def api_key(raw: bytes) -> str:
    """Return the text of the API key for 32 random bytes. It is a secret."""
    if len(raw) != 32:
        raise ValueError("an API key is 32 bytes")
    return "ck_" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def is_api_key(text: str) -> bool:
    """Whether a text has the form of an API key; only the gateway knows whether it is one."""
    return _API_KEY.match(text) is not None


def provider_id(identity_public_key: bytes) -> ProviderId:
    """Derive a provider's id from its 32-byte Ed25519 identity key."""
    return ProviderId(
        "prov_" + hashlib.sha256(b"cocoon provider id\0" + identity_public_key).hexdigest()[:32]
    )


def gateway_id(identity_public_key: bytes) -> GatewayId:
    """Derive a gateway's id from its 32-byte Ed25519 identity key: the bus binds it to that key."""
    return GatewayId(
        "gw" + hashlib.sha256(b"cocoon gateway id\0" + identity_public_key).hexdigest()[:12]
    )


def event_id(causation_id: str, index: int) -> str:
    """uuid5 of the causing command and the event's place in it: a repeat gives the same id."""
    return _uuid5(f"event\0{causation_id}\0{index}")


def request_command_id(account: AccountId, idempotency_key: str) -> str:
    """The command id of a client's request: (account, key) names one job for ever."""
    return _uuid5(f"request\0{account}\0{idempotency_key}")


def named_command_id(*parts: str) -> str:
    """A deterministic command id from a tuple of names, e.g. ("expire", job, epoch)."""
    return _uuid5("named\0" + "\0".join(parts))


def _uuid5(name: str) -> str:
    """str(uuid.uuid5(NAMESPACE, name)), for a fifth of the time: several are made for each job."""
    digest = hashlib.sha1(_NAMESPACE_BYTES + name.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"
