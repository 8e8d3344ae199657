"""Write the seeds of corpus/: valid examples and near misses, a handful for each target.

Run: python -m tests.fuzz.make_corpus. A seed that exists is never rewritten: keys are drawn and
libsodium draws its stream headers, so each run would change the bytes. Files named `found-*` are
inputs that fuzzing found; nothing here writes them.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from cocoon.bus.keys import SERVER, USER, nkey
from cocoon.contracts import commands as c
from cocoon.evidence.trust import trust_document
from cocoon.kernel import canonical
from cocoon.models.manifest import ModelFile, ModelManifest, describe_server
from cocoon.sealing import KeyBundle, Profile
from cocoon.sealing.padding import RecordType as Kind
from services.provider.frames import encode
from tests.fuzz import evidence_targets, reply_targets
from tests.fuzz.contract_targets import CALLOUT_SERVER
from tests.fuzz.openai_seeds import (
    completion_request,
    embedding_request,
    openai_completion,
    openai_embeddings,
)
from tests.fuzz.sealing_targets import FINAL, SIGN_RECEIPT, record, script_of
from tests.fuzz.targets import CORPUS, TARGETS
from tests.support import evidence_world, example_events, job_world, open_world
from tests.support import sealing_world as world
from tests.support.event_examples import EXAMPLES

Seeds = Iterator[tuple[str, bytes]]
PROFILES = ((Profile.P0, False), (Profile.P1, True), (Profile.P2, True), (Profile.P3, True))
CHUNK = reply_targets.ANSWER.delta_chunk("né")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


# ---- sealing ----


def request_envelope() -> Seeds:
    for profile, stream in PROFILES:
        yield profile.name, world.sealed(profile=profile, stream=stream, count=2).envelope
    honest = world.sealed(count=1).envelope
    yield "cut", honest[:-3]
    yield "unknown-flag", honest[:6] + b"\x80" + honest[7:]
    yield "trailing", honest + b"\0"
    yield "suite-2", honest[:5] + b"\2" + honest[6:]
    yield "header-only", honest[: 113 + 96]


def request_records() -> Seeds:
    content = b"/v1/chat/completions\0" + world.BODY
    for profile, size in ((0, 128), (1, 128), (2, 512), (3, 0)):
        whole = (FINAL, record(Kind.DATA, content, size))
        yield f"P{profile}", bytes([profile]) + script_of(whole)
    halves = [(0, record(Kind.DATA, content[:30], 128)), (0, record(Kind.PAD, b"", 128))]
    rest = (FINAL, record(Kind.DATA, content[30:], 128))
    yield "halves-and-pad", b"\0" + script_of(*halves, rest)
    yield "dirty-padding", b"\0" + script_of((FINAL, record(Kind.DATA, content, 127) + b"x"))
    yield "no-final", b"\0" + script_of((0, record(Kind.DATA, content, 128)))
    yield "no-endpoint", b"\3" + script_of((FINAL, record(Kind.DATA, world.BODY)))
    yield "receipt-inside", b"\3" + script_of((FINAL, record(Kind.RECEIPT, content)))


def _response(profile: Profile, stream: bool) -> bytes:
    request = world.sealed(profile=profile, stream=stream, count=2)
    return b"".join(world.respond(world.opened(request.envelope), [b'{"n":1}', b'{"n":2}']))


def response_prefix() -> Seeds:
    whole = _response(Profile.P2, True)
    yield "honest", whole[:104]
    yield "flags", whole[:6] + b"\0\1" + whole[8:104]
    yield "cut", whole[:103]


def response_bytes() -> Seeds:
    for cut, (profile, stream) in zip((0, 104, 128, 200), PROFILES, strict=True):
        yield profile.name, bytes([cut]) + _response(profile, stream)
    yield "cut", b"\0" + _response(Profile.P3, True)[:-1]


def response_records() -> Seeds:
    end = (SIGN_RECEIPT | FINAL, b"")
    for profile, size in ((1, 256), (2, 128), (3, 0)):
        pieces = [(0, record(Kind.DATA, b'{"n":1}', size)), (0, record(Kind.DATA, b"{}", size))]
        usage = (0, record(Kind.USAGE, world.USAGE, 512 if profile == 2 else size))
        yield f"P{profile}", bytes([profile]) + script_of(*pieces, usage, end)
    yield "P0", b"\0" + script_of((0, record(Kind.DATA, b"{}", 128)), end)
    error = (0, record(Kind.ERROR, b'{"error":{}}'))
    yield "error", b"\3" + script_of(error, end)
    cut = ((Kind.PART, b'{"a":'), (Kind.PART, b"1"), (Kind.DATA, b"}"))
    parts = [(0, record(kind, content)) for kind, content in cut]
    yield "parts-and-pad", b"\3" + script_of(*parts, (0, record(Kind.PAD, b"")), end)
    yield "no-receipt", b"\3" + script_of((FINAL, record(Kind.DATA, b"{}")))
    yield "receipt-within-an-object", b"\3" + script_of(parts[0], end)
    yield "after-the-end", b"\3" + script_of(end, (0, record(Kind.DATA, b"{}")))
    yield "two-usages", b"\3" + script_of(*[(0, record(Kind.USAGE, b"{}"))] * 2, end)


def receipt() -> Seeds:
    honest = reply_targets.RECEIPT
    yield "honest", honest.sign(world.SIGNER)
    yield "dear", replace(honest, price_nanoton=2**63 - 1, seq=2**64 - 1).sign(world.SIGNER)
    raw = honest.sign(world.SIGNER)
    yield "status-5", raw[:6] + b"\0\5" + raw[8:]
    yield "version-1", raw[:4] + b"\1" + raw[5:]
    yield "cut", raw[:-1]


def key_bundle() -> Seeds:
    begin, end = world.NOW_MS - 1000, world.NOW_MS + 500_000
    bundle = KeyBundle(bytes(range(32)), 7, begin, end, world.EVIDENCE)
    raw = bundle.sign(world.SIGNER)
    yield "honest", raw
    yield "other-evidence", replace(bundle, evidence_id=bytes(32)).sign(world.SIGNER)
    yield "over", replace(bundle, not_after_ms=world.NOW_MS).sign(world.SIGNER)
    yield "cut", raw[:92]


# ---- JSON and the bus ----


def canonical_json() -> Seeds:
    yield "object", canonical.dumps({"a": [1, -2, None, True], "b": {"c": 'né\n"\\'}})
    yield "spaces", b'{ "b": 1, "a": 2 }'
    yield "duplicate", b'{"a":1,"a":2}'
    yield "big", b"[9007199254740992,9007199254740993,-0,1e3,1.0]"
    yield "surrogate", b'["\\ud83d\\ude00","\\ud800","\xc3\xa9"]'
    yield "not-a-number", b"[NaN,Infinity]"
    yield "deep", b"[" * 90 + b"]" * 90


def event() -> Seeds:
    for example in EXAMPLES:
        yield example.event_type, example.to_canonical()


def command() -> Seeds:
    job = job_world
    for example in (
        job.request_command(), job.expire_command(), job.settle_command(job.matched_job()),
        c.OpenAccount(account_id="acct_1"),
        c.CreditDeposit(account_id="acct_1", amount_nanoton=5, source="dev", reference="r"),
        c.PublishPolicy(policy_hash="11" * 32, version=1, previous_hash=None),
    ):  # fmt: skip
        yield example.command_type, example.to_stored()
    yield "no-fields", b'{"command":{},"type":"OpenAccount"}'
    yield "a-list-for-a-type", b'{"command":{},"type":[]}'


def model_manifest() -> Seeds:
    files = [
        ModelFile(path=path, size_bytes=size, sha256=f"{size:02x}" * 32)
        for size, path in enumerate(("tokenizer.json", "original/params.json", "..a", "my m.gguf"))
    ]
    made = ModelManifest(
        name="org/m:7b", engine="vllm", files=tuple(files), tokenizer_sha256="00" * 32,
        quantisation="awq", arguments={"dtype": "half"},
    )  # fmt: skip
    yield "folder", made.to_canonical()
    yield "server", describe_server("llama", {"context_tokens": "4096"}).to_canonical()
    value = json.loads(made.to_canonical())
    for name, path in (("outside", "../x"), ("absolute", "/x"), ("backslash", "a\\b")):
        yield name, _json(value | {"files": [value["files"][0] | {"path": path}]})
    yield "twice", _json(value | {"files": value["files"] * 2})


def message() -> Seeds:
    alice = job_world.ALICE
    yield "JobRequest", job_world.job_request().to_canonical()
    yield "Heartbeat", alice.beat(("0f" * 16, 1)).to_canonical()
    yield "SubmitResult", alice.submit("0f" * 16, 1, b"\xc0" * 420).to_canonical()
    yield "Quote", job_world.QUOTE.to_canonical()
    yield "CancelJob", b'{"epoch":1,"job_id":"' + b"0f" * 16 + b'"}'
    yield "DispatchReply", b'{"accepted":false,"code":"busy"}'
    yield "Reply", b'{"data":{"a":[1]},"error":null,"ok":true}'
    yield "empty", b"{}"


def stored_event() -> Seeds:
    events = example_events.EXAMPLES[:6]
    for stored in example_events.stored(1, "job/" + example_events.JOB, events):
        lines = [f"{name}: {value}\r\n" for name, value in stored.to_headers().items()]
        yield stored.type, "".join(lines).encode() + b"\r\n" + stored.data


def bus_headers() -> Seeds:
    quote = job_world.QUOTE.to_canonical().decode()
    lines = (
        "Cocoon-Job: " + "0f" * 16, "Cocoon-Epoch: 1", "Cocoon-Req-Hash: " + "11" * 32,
        "Cocoon-Gateway: gw0123456789ab", f"Cocoon-Quote: {quote}", "traceparent: 00-" + "1" * 32,
    )  # fmt: skip
    yield "run-job", "\r\n".join(("NATS/1.0", *lines, "", "")).encode()
    yield "status", b"NATS/1.0 404 No Messages\r\n\r\n"
    yield "heartbeat", b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1016\r\n\r\n"
    yield "bare", b"NATS/1.0\r\n\r\n"
    yield "nothing", b"NATS/1.0"
    yield "status-of-no-text", b"NATS/1.0 \xff\xfe\xfd\r\n\r\n"
    yield "description-of-no-text", b"NATS/1.0 503 \xff\xfe\r\n\r\n"


def token_frame() -> Seeds:
    yield "more", encode(0, 0, b"CAI1 and so on")
    yield "last", encode(1, 2**40, b"the end", bytes(range(32)))
    yield "empty", encode(0, 7, b"")
    yield "cut", encode(1, 0, b"")[:9]
    yield "kind-2", encode(2, 0, b"x")


def chat_request() -> Seeds:
    turn = {"role": "user", "content": "hi"}
    plain: dict[str, Any] = {"model": "skills-1", "messages": [turn]}
    yield "plain", _json(plain)
    yield "full", _json(plain | {
        "temperature": 0.5, "top_p": 1, "seed": -1, "stop": ["a", "b"], "logit_bias": {"5": -100},
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5,
        "logprobs": True, "top_logprobs": 20, "metadata": {"a": "b"}, "user": "u",
        "frequency_penalty": -2, "service_tier": "auto", "n": 1, "store": False,
    })  # fmt: skip
    texts = [{"type": "text", "text": "né"}, {"type": "text", "text": "b"}]
    told = {"role": "assistant", "content": "x", "audio": None}
    yield "parts", _json(plain | {"messages": [turn | {"content": texts}, told]})
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    yield "schema", _json(plain | {"response_format": schema})
    open_schema = _json(plain | {"response_format": schema})[:-3]
    yield "surrogate", open_schema + b',"\\ud800":1}}}'
    yield "deep", open_schema + b',"d":' + b"[" * 300 + b"]" * 300 + b"}}}"
    yield "tools", _json(plain | {"tools": []})
    yield "unknown", _json(plain | {"n" * 200: 1})
    yield "image", _json(plain | {"messages": [turn | {"content": [{"type": "image_url"}]}]})


# ---- evidence ----


def trust_file() -> Seeds:
    document = trust_document(evidence_world.trust())
    yield "development", document
    value = json.loads(document)
    yield "production", canonical.dumps(value | {"network_class": "prod", "anchors": []})
    yield "production-with-a-development-root", canonical.dumps(value | {"network_class": "prod"})
    yield "two-signers", canonical.dumps(value | {"policy_signers": ["11" * 32, "22" * 32]})
    yield "too-few-signers", canonical.dumps(value | {"policy_threshold": 2})
    yield "unknown-field", canonical.dumps(value | {"z" * 600: 1})
    entry = value["anchors"][0]
    der = base64.b64decode(entry["der"]).replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\4")
    version_5 = entry | {"der": base64.b64encode(der).decode()}
    yield "certificate-of-version-5", canonical.dumps(value | {"anchors": [version_5]})
    yield "no-certificate", canonical.dumps(value | {"anchors": [entry | {"der": "MAA="}]})


def policy() -> Seeds:
    honest = evidence_world.Scene().signed_policy()
    yield "development", honest.to_canonical()
    yield "unsigned", honest.model_copy(update={"signatures": ()}).to_canonical()
    strict = evidence_world.Scene(
        signers=(bytes(32),),
        policy={"facility_ppids": ("ab" * 16,), "models": ("11" * 32,), "version": 7},
    )
    yield "strict", strict.signed_policy().to_canonical()
    yield "unknown-field", honest.to_canonical()[:-1] + b',"' + b"z" * 600 + b'":1}'
    yield "open-tier", open_world.OpenScene(signers=(bytes(32),)).signed_policy().to_canonical()


def provider_evidence() -> Seeds:
    honest = evidence_world.Scene().provider_evidence()
    yield "honest", honest.to_canonical()
    yield "no-collateral", honest.model_copy(update={"collateral": None}).to_canonical()
    yield "other-tee", honest.model_copy(update={"tee": "snp"}).to_canonical()
    yield "no-quote", honest.model_copy(update={"quote": b""}).to_canonical()
    yield "other-models", honest.model_copy(update={"models": ("22" * 32,)}).to_canonical()
    opened = open_world.OpenScene().provider_evidence()
    yield "open", opened.to_canonical()
    yield "open-called-tdx", opened.model_copy(update={"tee": "tdx"}).to_canonical()


def open_statement() -> Seeds:
    statement = evidence_targets.open_evidence().quote
    yield "honest", statement
    yield "trailing", statement + b"\0"
    yield "version-2", statement[:4] + b"\2" + statement[5:]
    yield "other-key", statement[:5] + bytes(32) + statement[37:]


def tdx_quote() -> Seeds:
    quote = evidence_targets.evidence().quote
    yield "honest", quote
    yield "trailing", quote + b"\0\0"
    yield "too-large", quote + bytes(16 * 1024)
    yield "cut", quote[:632]
    yield "version-5", b"\5\0" + quote[2:]
    yield "sgx", quote[:4] + b"\0\0\0\0" + quote[8:]
    yield "debug", quote[:168] + b"\1" + quote[169:]
    yield "other-length", quote[:632] + struct.pack("<I", 2**31) + quote[636:]


def collateral() -> Seeds:
    text = evidence_targets.evidence().collateral or ""
    value = json.loads(text)
    yield "honest", text.encode()
    yield "chain", value["tcb_info_issuer_chain"].encode()
    yield "no-levels", _json(value | {"tcb_info": "{}"})
    yield "no-chain", _json(value | {"tcb_info_issuer_chain": "x"})
    yield "no-list", _json(value | {"root_ca_crl": "3000"})


def claims() -> Seeds:
    yield "tdx", evidence_world.CLAIMS.encode()
    yield "flags", evidence_world.CLAIMS.encode()[:6] + b"\0\1" + evidence_world.CLAIMS.encode()[8:]
    yield "tee-3", evidence_world.CLAIMS.encode()[:5] + b"\3" + evidence_world.CLAIMS.encode()[6:]
    yield "cut", evidence_world.CLAIMS.encode()[:-1]


def event_log() -> Seeds:
    item: dict[str, Any] = {"imr": 3, "event_type": 0x0800_0001, "digest": "ab" * 48}
    item |= {"event": "e", "event_payload": "00"}
    yield "empty", b"[]"
    yield "one", _json([item])
    yield "boot", _json([item | {"imr": 0}, item | {"imr": 2}])
    yield "colon", _json([item | {"event": "a:b"}])


def signed_checkpoint() -> Seeds:
    root = base64.b64encode(bytes(range(32))).decode()
    body = f"{evidence_targets.LOG_ORIGIN}\n42\n{root}\n".encode()
    yield "signed", evidence_targets.sign_note(body)
    yield "body", body
    yield "extension", body + b"extension\n"
    yield "other-signer", evidence_targets.sign_note(body, evidence_targets.SigningKey(bytes(32)))
    yield "no-size", body.replace(b"42", b"042")
    yield "no-root", body.replace(root.encode(), "né".encode())


# ---- replies ----


def openai_body() -> Seeds:
    choice = {"message": {"content": "hello"}, "finish_reason": "stop"}
    yield "answer", _json({"choices": [choice], "usage": USAGE})
    told = {"content": [{"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []}]}
    yield "logprobs", _json({"choices": [choice | {"logprobs": told}], "usage": USAGE})
    yield (
        "error",
        _json({"error": {"message": "m", "code": "context_length_exceeded", "param": "p"}}),
    )
    details = USAGE | {"prompt_tokens_details": {"cached_tokens": 2}}
    details |= {"completion_tokens_details": {"reasoning_tokens": 1}}
    yield "details", _json({"choices": [choice], "usage": details})
    counts = b'"usage":{"prompt_tokens":1,"completion_tokens":1}'
    head = b'{"choices":[{"finish_reason":"stop","message":{"content":'
    yield "surrogate", head + b'"\\ud800"}}],%b}' % counts
    token = head + b'"a"},"logprobs":{"content":[{"token":"a","logprob":%b}]}}],%b}'
    yield "minus-infinity", token % (b"-Infinity", counts)
    yield "not-a-number", token % (b"NaN", counts)
    yield "many-bytes", token % (b'0,"bytes":900000', counts)
    yield "no-object", b'{"choices":[1],"usage":{}}'
    yield "no-count", _json({"choices": [choice], "usage": USAGE | {"prompt_tokens": -1}})
    yield "infinite-count", head + b'""}}],%b}' % counts.replace(b"1", b"1e999")


def openai_stream() -> Seeds:
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    lines = [_json(item) for item in (CHUNK, CHUNK, end, {"choices": [], "usage": USAGE})]
    yield "stream", b"\n".join(lines)
    yield "error", lines[0] + b'\n{"error":{"message":"m"}}'
    yield "no-usage", b"\n".join(lines[:3])
    yield "no-delta", b'{"choices":[{"delta":5,"finish_reason":"stop"}]}'
    yield "number-for-text", b'{"choices":[{"delta":{"content":5}}]}'
    listed = _json({"usage": USAGE | {"prompt_tokens_details": [1]}})
    yield "list-for-details", b"\n".join([*lines[:3], listed])


def _tensors(text: bytes, tokens: int, told: bytes, reason: bytes, *usage: int) -> bytes:
    raws = [struct.pack("<I", len(item)) + item for item in (text, told, reason)]
    numbers = struct.pack("<i", tokens), struct.pack("<4i", *usage)
    ordered = (raws[0], numbers[0], raws[1], raws[2], numbers[1])
    return b"".join(len(raw).to_bytes(2, "big") + raw for raw in ordered)


def triton_reply() -> Seeds:
    yield "started", _tensors(b"", 0, b"", b"", 7, 0, 0, 0)
    yield "piece", _tensors("né".encode(), 2, b'[["61",-0.5,[["62",-1.0,[]]]]]', b"", 0, 0, 0, 0)
    yield "ended", _tensors(b"", 0, b"", b"stop", 7, 3, 2, 1)
    yield "too-many-cached", _tensors(b"", 0, b"", b"length", 1, 1, 2, 0)
    yield "big-number", _tensors(b"", 0, b'[["61",' + b"9" * 400 + b",[]]]", b"", 0, 0, 0, 0)
    yield "a-text-for-an-entry", _tensors(b"", 0, b'["abc"]', b"", 0, 0, 0, 0)
    yield "error", b"in ensemble: cocoon-error:request:context_length_exceeded:messages"


def triton_metrics() -> Seeds:
    yield "metrics", (
        b'# HELP nv_inference_pending_request_count x\n'
        b'nv_inference_pending_request_count{model="skills-1",version="1"} 3\n'
        b'cocoon_engine_running{model="skills-1"} 2.000000\n'
        b'cocoon_engine_running{model="other"} 9\n'
    )  # fmt: skip
    yield "big", b'cocoon_engine_running{model="skills-1"} 999999999999999.999999999999999\n'
    yield "none", b"nothing here\n"


def client_stream() -> Seeds:
    end = reply_targets.ANSWER.final_chunk("stop")
    usage = {"choices": [], "usage": USAGE}
    chunks = [_json(item) for item in (CHUNK, CHUNK, end, usage)]
    yield "stream", b"\0".join([*chunks, _json(USAGE)])
    yield "usage-by-the-record", b"\0".join([*chunks[:3], _json(USAGE)])
    yield "line-ends", json.dumps(CHUNK, indent=1).encode() + b"\0" + _json(USAGE)
    yield "list-for-usage", b'{"choices":[],"usage":[1]}\0{}'
    yield "usage-is-no-object", chunks[0] + b"\0[]"
    yield "no-text", b'{"x":"\xff","choices":[]}\0{}'
    yield "surrogate", b'{"x":"\\ud800",\n"choices":[]}\0{}'
    yield "not-a-number", b'{"x":NaN,"choices":[]}\0{}'
    yield "deep", b'{"choices":[],"x":' + b"[" * 2000 + b"]" * 2000 + b"}\0{}"


def client_body() -> Seeds:
    whole = reply_targets.ANSWER.completion("hello", "stop", reply_targets.TokenUsage(7, 3))
    yield "answer", _json(whole)
    error = {"message": "m", "type": "invalid_request_error", "code": "c", "param": "p"}
    yield "error", _json({"error": error})
    yield "list-for-usage", b'{"usage":[]}'
    yield "surrogate", b'{"a":"\\ud800"}'
    yield "not-a-number", b'{"a":NaN,"b":1e999}'
    yield "error-of-no-text", b'{"error":{"message":"\\ud800","type":[],"code":"\\udfff"}}'


def gateway_answer() -> Seeds:
    ok, chunked = b"HTTP/1.1 200 OK\r\n", b"transfer-encoding: chunked\r\n\r\n"
    yield "whole", ok + b"content-length: 5\r\nx-cocoon-epoch: 1\r\n\r\nhello"
    yield "chunked", ok + chunked + b"2\r\nhe\r\n\x003;a=b\r\nllo\r\n\x000\r\nx: y\r\n\r\n"
    yield "to-the-end", b"HTTP/1.0 200 OK\r\n\r\nhel\0lo"
    yield "hints", b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" + ok + b"content-length: 0\r\n\r\n"
    yield "upgrade", b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nbytes"
    yield "twice", (ok + b"content-length: 2\r\n\r\nok") * 2
    yield "two-lengths", ok + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello"
    yield "bad-chunk", ok + chunked + b"zz\r\n"
    yield "no-http", b"SSH-2.0-OpenSSH_9.6\r\n"


def callout() -> Seeds:
    server = nkey(SERVER, bytes(CALLOUT_SERVER.verify_key))
    client = SigningKey(bytes([7] * 32))
    signature = base64.b64encode(client.sign(b"nonce").signature).decode()
    user = nkey(USER, bytes(client.verify_key))
    claims: dict[str, Any] = {
        "iss": server, "aud": "nats-authorization-request", "exp": 1,
        "nats": {
            "type": "authorization_request", "user_nkey": user, "server_id": {"id": server},
            "client_info": {"host": "192.0.2.1", "id": 1, "type": "nats", "nonce": "nonce"},
            "connect_opts": {"nkey": user, "sig": signature},
        },
    }  # fmt: skip
    yield "honest", _json(claims)
    claims["nats"]["client_tls"] = {"version": "1.3"}
    claims["nats"]["connect_opts"]["sig"] = signature[:-4]
    yield "cut-signature", _json(claims)
    claims["nats"]["connect_opts"] = {"user": "a", "pass": "b"}
    yield "no-key", _json(claims)


__all__ = ["completion_request", "embedding_request", "openai_completion", "openai_embeddings"]
MAKERS: dict[str, Callable[[], Seeds]] = {
    name: globals()[name]
    # the evidence's targets start from the trust file, the policy and the evidence written first
    for name in sorted(TARGETS, key=["tdx_quote", "collateral", "open_statement"].__contains__)
}


def main() -> None:
    written = 0
    for name, make in MAKERS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in make():
            path = folder / seed
            if not path.exists():
                path.write_bytes(data)
                written += 1
    print(f"wrote {written} seeds")


if __name__ == "__main__":
    main()
