"""Write cai1-v2.json: CAI/1 requests, responses and receipts with every derived key.

Run: python tests/vectors/make_cai1.py. All secrets are fixed; libsodium draws the two
secretstream headers itself, so the file changes at each run and only its decrypt side is
deterministic. Test keys: never use them for anything else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "libs")]

from cocoon.sealing import KeyBundle, Profile, ResponseSealer, Status, receipt_hash  # noqa: E402
from cocoon.sealing.derive import request_keys, response_key, sha256  # noqa: E402
from cocoon.sealing.keys import MAX_BUNDLE_MS  # noqa: E402
from tests.support import sealing_world as world  # noqa: E402

LONG = b'{"long":"%b"}' % (b"z" * 600)


class Case(NamedTuple):
    name: str
    profile: Profile
    stream: bool
    status: Status
    objects: list[bytes]


CASES = (
    Case("p0-one-body", Profile.P0, False, Status.COMPLETE, [b'{"choices":[{"index":0}]}']),
    Case("p1-cut-object", Profile.P1, True, Status.LENGTH, [b'{"n":1}', LONG]),
    Case("p2-stream", Profile.P2, True, Status.COMPLETE, [b'{"n":1}', b'{"n":2}', b'{"n":3}']),
    Case("p3-bare", Profile.P3, True, Status.CANCELLED, [b'{"n":1}']),
)


def make_case(given: Case, *, previous: bytes, seq: int) -> tuple[dict[str, object], bytes]:
    name, profile, stream, status, objects = given
    request = world.sealed(profile=profile, stream=stream, seed=name)
    fixed = world.Counted(name)
    cek, *ephemerals = (fixed.token(32) for _ in range(4))
    resp_eph_sk = world.Counted(f"enclave {name}").token(32)
    opened = world.opened(request.envelope, seed=f"enclave {name}")
    exports = opened.response_secret
    sealer = ResponseSealer(opened)
    response = sealer.prefix() + b"".join(sealer.data(item) for item in objects)
    response += sealer.pad() + sealer.usage(world.USAGE)
    receipt = world.signed_receipt(sealer, status=status, seq=seq, prev_receipt_hash=previous)
    response += sealer.finish(receipt)
    header = request.envelope[: 113 + 96 * 3]
    stream_key, commit_key = request_keys(sha256(header), cek)
    case: dict[str, object] = {
        "name": name, "profile": int(profile), "stream": stream,
        "cek": cek.hex(), "client_eph_sk": [secret.hex() for secret in ephemerals],
        "responder": 1, "resp_eph_sk": resp_eph_sk.hex(), "endpoint": opened.endpoint,
        "body": opened.body.decode(), "header_hash": sha256(header).hex(),
        "req_hash": opened.req_hash.hex(), "wrap_key": exports.wrap_key.hex(),
        "response_export": exports.response_export.hex(),
        "ephemeral_dh": exports.ephemeral_dh.hex(), "request_stream_key": stream_key.hex(),
        "commit_key": commit_key.hex(),
        "response_stream_key": response_key(
            sha256(response[:104]), exports.response_export, exports.ephemeral_dh
        ).hex(),
        "prompt_commit": opened.prompt_commit.hex(), "objects": [o.decode() for o in objects],
        "usage": world.USAGE.decode(), "request": request.envelope.hex(),
        "response": response.hex(), "receipt": receipt.hex(),
    }  # fmt: skip
    return case, receipt_hash(receipt)


def main() -> None:
    cases, previous = [], bytes(32)
    for seq, case in enumerate(CASES):
        made, previous = make_case(case, previous=previous, seq=seq)
        cases.append(made)
    bundle = KeyBundle(
        world.recipients()[1].x25519_pk, 3, world.NOW_MS, world.NOW_MS + MAX_BUNDLE_MS,
        world.EVIDENCE,
    )  # fmt: skip
    document = {
        "description": "CAI/1 suite 1, receipt version 2. Test keys. See docs/protocol.md.",
        "enclave_sk": [secret.hex() for secret in world.SECRETS],
        "enclave_pk": [one.x25519_pk.hex() for one in world.recipients()],
        "key_ids": [one.key_id.hex() for one in world.recipients()],
        "sign_seed": bytes(world.SIGNER).hex(), "sign_pk": world.SIGN_PK.hex(),
        "job_id": world.JOB.hex(), "model_id": world.MODEL.hex(),
        "policy_hash": world.POLICY.hex(), "quote_id": world.QUOTE.hex(),
        "evidence_id": world.EVIDENCE.hex(), "max_price_nanoton": "1000000",
        "max_input_tokens": 4096, "max_output_tokens": 1024,
        "not_after_ms": world.NOT_AFTER_MS, "key_bundle": bundle.sign(world.SIGNER).hex(),
        "cases": cases,
    }  # fmt: skip
    target = Path(__file__).with_name("cai1-v2.json")
    target.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
