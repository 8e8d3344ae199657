"""Known answers: the project's own (receipt version 2) and the elder ones (version 1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import VerifyKey

from cocoon.sealing import (
    Data,
    Finished,
    KeyRing,
    Profile,
    Recipient,
    ResponseOpener,
    Usage,
    accept_request,
    check_chain,
    hpke,
    open_accepted,
    parse_header,
    seal_request,
    verify_bundle,
    verify_receipt,
)
from cocoon.sealing.derive import (
    OUTPUT_LABEL,
    PROMPT_LABEL,
    commit,
    hpke_info,
    key_id,
    request_keys,
    response_key,
    sha256,
)
from cocoon.sealing.padding import RecordType, request_rule, response_rule
from cocoon.sealing.records import FrameOpener, Record
from tests.support import sealing_world as world

ROOT = Path(__file__).resolve().parents[3]
OWN = json.loads((ROOT / "tests" / "vectors" / "cai1-v2.json").read_text())
ELDER = ROOT.parent / "shared" / "vectors" / "sealing" / "cai1-ok.json"


def raw(holder: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(holder[name])


class Fixed:
    """Randomness that hands out a vector's secrets in the order in which they are drawn."""

    def __init__(self, *tokens: bytes) -> None:
        self._tokens = list(tokens)

    def token(self, size: int) -> bytes:
        token = self._tokens.pop(0)
        assert len(token) == size
        return token


@pytest.mark.parametrize("case", OWN["cases"], ids=lambda case: str(case["name"]))
def test_an_enclave_opens_the_vector_and_derives_its_keys(case: dict[str, Any]) -> None:
    envelope, index = raw(case, "request"), case["responder"]
    ring = KeyRing()
    ring.add(bytes.fromhex(OWN["enclave_sk"][index]))
    accepted = accept_request(
        envelope, key_ids=ring.key_ids(), now_ms=OWN["not_after_ms"],
        policy_hashes={raw(OWN, "policy_hash")}, model_ids={raw(OWN, "model_id")},
        expected_req_hash=raw(case, "req_hash"),
    )  # fmt: skip
    slot, secret = accepted.slot, raw(case, "resp_eph_sk")
    exports = ring.job_exports(slot.key_id, slot.enc, accepted.fixed_header, secret)
    assert exports == tuple(
        raw(case, name) for name in ("wrap_key", "response_export", "ephemeral_dh")
    )
    opened = open_accepted(accepted, exports, resp_eph_pk=hpke.public_key(secret))
    assert (opened.endpoint, opened.body.decode()) == (case["endpoint"], case["body"])
    assert opened.prompt_commit == raw(case, "prompt_commit")
    assert opened.commit_key == raw(case, "commit_key")
    header_hash = sha256(envelope[: accepted.header_len])
    assert header_hash == raw(case, "header_hash")
    assert request_keys(header_hash, raw(case, "cek"))[0] == raw(case, "request_stream_key")
    prefix_hash = sha256(raw(case, "response")[:104])
    assert response_key(prefix_hash, *exports[1:]) == raw(case, "response_stream_key")


@pytest.mark.parametrize("case", OWN["cases"], ids=lambda case: str(case["name"]))
def test_a_client_makes_the_vector_s_header_and_reads_its_response(case: dict[str, Any]) -> None:
    request = seal_request(
        header=world.header(profile=Profile(case["profile"]), stream=case["stream"]),
        recipients=[Recipient.of(bytes.fromhex(pk)) for pk in OWN["enclave_pk"]],
        endpoint=case["endpoint"], body=case["body"].encode(),
        randomness=Fixed(raw(case, "cek"), *map(bytes.fromhex, case["client_eph_sk"])),
    )  # fmt: skip
    header_len = parse_header(request.envelope)[1]
    assert request.envelope[:header_len] == raw(case, "request")[:header_len]
    assert request.secrets.prompt_commit == raw(case, "prompt_commit")
    # only the secretstream's own header differs, and with it the request's hash
    object.__setattr__(request.secrets, "req_hash", raw(case, "req_hash"))
    opener = ResponseOpener(
        request.secrets, {bytes.fromhex(OWN["key_ids"][case["responder"]]): raw(OWN, "sign_pk")},
        quote_id=raw(OWN, "quote_id"), epoch=7,
    )  # fmt: skip
    *data, usage, end = opener.feed(raw(case, "response"))
    assert b"".join(one.content for one in data if isinstance(one, Data)).decode() == "".join(
        case["objects"]
    )
    assert usage == Usage(case["usage"].encode())
    assert isinstance(end, Finished)
    assert end.raw == raw(case, "receipt")


def test_the_vectors_receipts_chain_and_the_bundle_verifies() -> None:
    receipts = [raw(case, "receipt") for case in OWN["cases"]]
    for before, after in zip([None, *receipts], receipts, strict=False):
        check_chain(before, after)
        verify_receipt(after, raw(OWN, "sign_pk"))
    bundle = verify_bundle(
        raw(OWN, "key_bundle"), ed25519_pk=raw(OWN, "sign_pk"),
        evidence_id=raw(OWN, "evidence_id"), now_ms=world.NOW_MS,
    )  # fmt: skip
    assert bundle.key_id.hex() == OWN["key_ids"][1]


@pytest.fixture(name="elder")
def _elder() -> dict[str, Any]:
    if not ELDER.exists():
        pytest.skip("the shared vectors (../shared/vectors/sealing) are not beside this checkout")
    document: dict[str, Any] = json.loads(ELDER.read_text())
    return document


def records_of(opener: FrameOpener, data: bytes) -> list[Record]:
    return [opener.open(frame[4:]) for frame in world.frames(data)]


def test_elder_request_every_derived_key(elder: dict[str, Any]) -> None:
    envelope = raw(elder, "request")
    header, length = parse_header(envelope)
    assert header.job_id == raw(elder, "job")
    assert header.model_id == raw(elder, "model")
    assert header.policy_hash == raw(elder, "policy")
    assert (header.max_price_nanoton, header.max_input_tokens) == (1_000_000, 4096)
    assert (header.max_output_tokens, header.not_after_ms) == (1024, 1_800_000_000_000)
    assert (header.profile, header.stream) == (Profile.P0, False)
    header_hash = sha256(envelope[:length])
    assert header_hash == raw(elder, "header_hash")
    assert sha256(envelope) == raw(elder, "req_hash")
    for index, slot in enumerate(header.recipients):
        secret = bytes.fromhex(elder["enclave_sk"][index])
        public = bytes.fromhex(elder["enclave_pk"][index])
        assert hpke.public_key(secret) == public
        assert slot.key_id == key_id(public) == bytes.fromhex(elder["key_ids"][index])
        context = hpke.setup_receiver(slot.enc, secret, hpke_info(envelope[:113]))
        assert context.export(b"cai/1 wrap", 32).hex() == elder["hpke_export_wrap"][index]
        assert context.export(b"cai/1 response", 32).hex() == elder["hpke_export_response"][index]
        eph = bytes.fromhex(elder["client_eph"][index])
        enc, sender = hpke.setup_sender(public, hpke_info(envelope[:113]), eph_sk=eph)
        assert enc == slot.enc
        assert sender.export(b"cai/1 wrap", 32).hex() == elder["hpke_export_wrap"][index]
    stream_key, commit_key = request_keys(header_hash, raw(elder, "cek"))
    assert stream_key == raw(elder, "request_stream_key")
    assert commit_key == raw(elder, "commit_key")
    opener = FrameOpener(
        stream_key, envelope[length : length + 24], aad=header_hash, rule=request_rule(Profile.P0)
    )
    (record,) = records_of(opener, envelope[length + 24 :])
    assert record == Record(RecordType.DATA, elder["prompt"].encode(), final=True)


def test_elder_response_and_its_version_1_receipt(elder: dict[str, Any]) -> None:
    response, index = raw(elder, "response"), elder["responding_recipient"]
    resp_eph_sk = raw(elder, "resp_eph_sk")
    assert response[72:104] == hpke.public_key(resp_eph_sk)
    slot = parse_header(raw(elder, "request"))[0].recipients[index]
    prefix_hash = sha256(response[:104])
    key = response_key(
        prefix_hash,
        bytes.fromhex(elder["hpke_export_response"][index]),
        hpke.x25519(resp_eph_sk, slot.enc),
    )
    rule = response_rule(Profile.P0)
    opener = FrameOpener(key, response[104:128], aad=prefix_hash, rule=rule)
    *records, last = records_of(opener, response[128:])
    output = b"".join(one.content for one in records if one.kind is RecordType.DATA)
    assert output == elder["output"].encode()
    receipt = raw(elder, "receipt")
    assert last == Record(RecordType.RECEIPT, receipt, final=True)
    VerifyKey(raw(elder, "sign_pk")).verify(b"cai/1 receipt\0" + receipt[:-64], receipt[-64:])
    commit_key = raw(elder, "commit_key")
    # version 1: fields up to the commitments are version 2's without epoch and quote
    assert receipt[104:136] == sha256(response[: -(4 + 17 + 512)])
    assert receipt[136:168] == commit(commit_key, PROMPT_LABEL, elder["prompt"].encode())
    assert receipt[168:200] == commit(commit_key, OUTPUT_LABEL, output)
