"""NATS auth callout: the server's question who a connection is, and the signed answer. Pure.

The server proves nothing of a key that is in no file of its own: it passes the client's signature
of its nonce on, and the check is here (nats-server, "Auth Callout"; JWTs by nats-io/jwt v2).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from cocoon.bus.keys import ACCOUNT, SERVER, USER, nkey, raw_of_nkey
from cocoon.bus.permissions import Permissions
from cocoon.kernel.errors import Forbidden

MAX_QUESTION_BYTES: Final = 32 * 1024
_AUDIENCE: Final = "nats-authorization-request"
_ALGORITHM: Final = "ed25519-nkey"
_TRANSPORTS: Final = ("STANDARD", "WEBSOCKET")  # no leaf nodes, no MQTT
_NO_LIMIT: Final = -1  # what an account may do is bounded in the server's configuration
_SIGNATURE_BYTES: Final = 64
T = TypeVar("T")


class _Head(msgspec.Struct):
    typ: str
    alg: str


class _Server(msgspec.Struct):
    id: str


class _Client(msgspec.Struct):
    host: str = ""
    nonce: str = ""


class _Connect(msgspec.Struct):
    nkey: str = ""
    sig: str = ""


class _Body(msgspec.Struct):
    type: str
    user_nkey: str
    server_id: _Server
    client_info: _Client
    connect_opts: _Connect
    client_tls: dict[str, Any] | None = None


class _Claims(msgspec.Struct):
    iss: str
    aud: str
    nats: _Body


@dataclass(frozen=True, slots=True)
class Question:
    """What the server wants to know. Nothing in it but the server's own names is proven."""

    user_nkey: str  # drawn by the server for this one connection: the answer is for nobody else
    server_id: str
    host: str
    encrypted: bool
    nkey: str
    signature: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a connection may come in, as what, and until when (Unix seconds)."""

    name: str
    allowed: Permissions
    until_s: int


def read_question(data: bytes) -> Question:
    """Read what the server asks. Raises ValueError for what no server of NATS says."""
    claims = _read_jwt(data)
    body = claims.nats
    raw_of_nkey(USER, body.user_nkey)
    if claims.aud != _AUDIENCE or body.type != "authorization_request":
        raise ValueError("this token asks for no authorization")
    if body.server_id.id != claims.iss:
        raise ValueError("the token was signed by another server than it names")
    return Question(
        user_nkey=body.user_nkey,
        server_id=body.server_id.id,
        host=body.client_info.host,
        encrypted=body.client_tls is not None,
        nkey=body.connect_opts.nkey,
        signature=body.connect_opts.sig,
        nonce=body.client_info.nonce,
    )


def identity_of(question: Question) -> bytes:
    """The Ed25519 key that the client has proven to hold, by its signature of the server's nonce.

    Raises Forbidden with a sentence for the server's log.
    """
    if not question.nkey:
        raise Forbidden("it shows no key; connect with an Ed25519 nkey of a user", code="no_key")
    try:
        key = raw_of_nkey(USER, question.nkey)
    except ValueError:
        raise Forbidden("its key is not an Ed25519 nkey of a user", code="bad_key") from None
    try:
        signature = _base64(question.signature)
        if not question.nonce or len(signature) != _SIGNATURE_BYTES:
            raise BadSignatureError
        VerifyKey(key).verify(question.nonce.encode(), signature)
    except (BadSignatureError, ValueError):
        raise Forbidden(
            "it does not prove its key: the signature is not one of this connection's nonce",
            code="bad_signature",
        ) from None
    return key


def admit(question: Question, place: Place, issuer: SigningKey, now_s: int) -> bytes:
    """The answer that lets this connection in."""
    allowed = place.allowed
    user = {
        "sub": question.user_nkey,
        "aud": allowed.account,
        "name": place.name,
        "exp": place.until_s,
        "nats": {
            "type": "user",
            "version": 2,
            "pub": {"allow": list(allowed.publish)},
            "sub": {"allow": list(allowed.subscribe)},
            "subs": _NO_LIMIT,
            "data": _NO_LIMIT,
            "payload": _NO_LIMIT,
            "allowed_connection_types": list(_TRANSPORTS),
        },
    }
    return _answer(question, {"jwt": _sign(user, issuer, now_s)}, issuer, now_s)


def refuse(question: Question, reason: str, issuer: SigningKey, now_s: int) -> bytes:
    """The answer that keeps this connection out; the server writes `reason` into its own log."""
    return _answer(question, {"error": reason}, issuer, now_s)


# ---- tokens ----


def _answer(question: Question, told: dict[str, Any], issuer: SigningKey, now_s: int) -> bytes:
    nats = {"type": "authorization_response", "version": 2, **told}
    claims = {"sub": question.user_nkey, "aud": question.server_id, "nats": nats}
    return _sign(claims, issuer, now_s).encode()


def _sign(claims: dict[str, Any], issuer: SigningKey, now_s: int) -> str:
    whole = {**claims, "iss": nkey(ACCOUNT, bytes(issuer.verify_key)), "iat": now_s}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).digest()
    whole["jti"] = base64.b32encode(digest).decode().rstrip("=")
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"typ": "JWT", "alg": _ALGORITHM}, whole)
    ]
    signed = ".".join(parts)
    signature = issuer.sign(signed.encode()).signature
    return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _read_jwt(data: bytes) -> _Claims:
    if len(data) > MAX_QUESTION_BYTES or not data.isascii():
        raise ValueError("not a token of this size")
    parts = data.decode().split(".")
    if len(parts) != 3:
        raise ValueError("a token has three parts")
    head = _decode(_base64(parts[0]), _Head)
    if head.typ.upper() != "JWT" or head.alg != _ALGORITHM:
        raise ValueError("the token is signed by another algorithm")
    claims = _decode(_base64(parts[1]), _Claims)
    signature = _base64(parts[2])
    try:
        if len(signature) != _SIGNATURE_BYTES:
            raise BadSignatureError
        key = VerifyKey(raw_of_nkey(SERVER, claims.iss))
        key.verify(f"{parts[0]}.{parts[1]}".encode(), signature)
    except BadSignatureError:
        raise ValueError("the token's signature is not its issuer's") from None
    return claims


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise ValueError("the token does not hold what it should") from None


def _base64(text: str) -> bytes:
    """Base64 in either alphabet, with or without padding. Raises ValueError."""
    if not text.isascii():
        raise ValueError("not base64")
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
