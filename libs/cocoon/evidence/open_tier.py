"""The word of a provider without a TEE: its identity key signs what a quote would cover.

It proves who speaks and that the claims are theirs, and nothing about the machine: the verdict is
of the tier `open`, whatever else is in it.

statement, 165 bytes: "CAIO" | version u8 = 1 | identity key 32 | report data 64 | Ed25519 signature
64 over "cai/1 open statement\\0\\xff" and what is before it. The identity key also signs what a
server of the bus asks it to, a text: 0xff is in no text (UTF-8), so none can have a statement made.
"""

from __future__ import annotations

import struct

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from cocoon.evidence.claims import TeeKind, evidence_id, signed_part
from cocoon.evidence.policy import Policy
from cocoon.evidence.verdict import Verdict, accept_open, fail, reject
from cocoon.kernel.ids import provider_id as id_of

STATEMENT_BYTES = 165
_BODY = struct.Struct(">4sB32s64s")
_MAGIC, _VERSION = b"CAIO", 1
_SIGNED_AS = b"cai/1 open statement\0\xff"
_MAX_NOW_MS = 2**53


def make_statement(identity: SigningKey, report_data: bytes) -> bytes:
    """Sign 64 bytes of report data. Raises ValueError for another size."""
    if len(report_data) != 64:
        raise ValueError("report data are 64 bytes")
    body = _BODY.pack(_MAGIC, _VERSION, bytes(identity.verify_key), report_data)
    return body + identity.sign(_SIGNED_AS + body).signature


def verify_statement(
    statement: bytes, provider_id: str, policy: Policy, now_ms: int
) -> tuple[Verdict, str]:
    """The verdict on a statement, and the report data (hex) that it signs ("" if it is not read).

    An ok verdict ends never by itself: the claims that the report data cover say when. Never
    raises for bad input.
    """
    if not 0 <= now_ms <= _MAX_NOW_MS:
        return fail("clock"), ""
    if len(statement) != STATEMENT_BYTES:
        return reject("malformed", f"A statement has {STATEMENT_BYTES} bytes."), ""
    body = signed_part(TeeKind.NONE, statement)
    magic, version, key, report_data = _BODY.unpack(body)
    if (magic, version) != (_MAGIC, _VERSION):
        return reject("malformed", "It is not a statement of version 1."), ""
    identity = evidence_id(TeeKind.NONE, statement)
    verdict = accept_open(_MAX_NOW_MS)
    try:
        VerifyKey(key).verify(_SIGNED_AS + body, statement[len(body) :])
    except BadSignatureError:
        verdict = reject("bad_signature")
    else:
        if id_of(key) != provider_id:
            verdict = reject("identity")
        elif identity.hex() in policy.bans.evidence_ids:
            verdict = reject("banned")
    return verdict.with_(evidence_id=identity), report_data.hex()
