"""A small real network for the client's tests: enclaves with dev evidence behind an ASGI gateway.

It seals with cocoon.sealing, proves with the DEV ONLY authority and runs in uvicorn on loopback;
`Faults` says what this gateway or its enclaves do wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import uvicorn
from nacl.signing import SigningKey

from cocoon.chat import Answer, TokenUsage, parse_chat_request, to_json
from cocoon.contracts.events import Quote
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.domain import pricing
from cocoon.evidence import claims as binding
from cocoon.evidence.claims import Claims, TeeKind
from cocoon.evidence.open_tier import make_statement
from cocoon.evidence.policy import OpenTierRules, policy_hash, sign
from cocoon.evidence.provider import ProviderEvidence, verify_provider
from cocoon.evidence.trust import TrustAnchors
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.ids import provider_id
from cocoon.sealing import (
    KeyBundle,
    KeyRing,
    OpenedRequest,
    ResponseSealer,
    Status,
    open_request,
    parse_header,
    public_count,
)
from cocoon.sealing.padding import RecordType

MODEL = hashlib.sha256(b"skills-1").hexdigest()
NETWORK = "cocoon-client-test"
KEY = "ck_" + "k" * 43
POLICY_SIGNER = SigningKey(bytes(range(32)))
WORDS = ("The ", "quick ", "brown ", "fox ", "jumps ", "over ", "it.")
TEXT = "".join(WORDS)
OPEN_TIER = OpenTierRules(
    allowed=True, max_running_jobs=2, max_job_nanoton=10**9, max_providers=4
)  # fmt: skip
PRICES = {"input": 1_000_000, "cached": 500_000, "output": 2_000_000}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@cache
def authority() -> DevAuthority:
    return DevAuthority.create(now_ms())


def trust() -> TrustAnchors:
    return dev_trust(authority(), NETWORK, bytes(POLICY_SIGNER.verify_key), bytes(32))


class Enclave:
    """One provider: keys, evidence of a simulated machine (or none), a signed key bundle."""

    def __init__(
        self, *, price_factor: int = 1, context_tokens: int = 4096, is_open: bool = False
    ) -> None:
        self.tee = TeeKind.NONE if is_open else TeeKind.TDX
        self.tier = "open" if is_open else "simulated"  # as the directory calls it
        self.running = 0
        self.identity = SigningKey(secrets.token_bytes(32))
        self.provider_id = provider_id(bytes(self.identity.verify_key))
        self.signer = SigningKey(secrets.token_bytes(32))
        self.ring = KeyRing()
        self.x25519_pk = self.ring.generate(SystemRandomness())
        self.context_tokens = context_tokens
        self.quote = Quote(
            model_id=MODEL,
            input_nanoton_per_mtok=PRICES["input"] * price_factor,
            cached_input_nanoton_per_mtok=PRICES["cached"] * price_factor,
            output_nanoton_per_mtok=PRICES["output"] * price_factor,
            fee_bps=500,
        )
        self.evidence = self._evidence()
        self.evidence_id = binding.evidence_id(self.tee, self.evidence.quote)
        self.rotate()

    def rotate(self, ahead_ms: int = 0) -> None:
        """A new epoch's key: requests for the old one can no longer be opened."""
        for key in self.ring.key_ids():
            self.ring.forget(key)
        self.x25519_pk = self.ring.generate(SystemRandomness())
        at = now_ms() + ahead_ms
        self.bundle = KeyBundle(self.x25519_pk, 1, at - 1000, at + 600_000, self.evidence_id).sign(
            self.signer
        )

    def _evidence(self) -> ProviderEvidence:
        at = now_ms()
        root, random = secrets.token_bytes(32), secrets.token_bytes(32)
        claims = Claims(
            tee=self.tee,
            x25519_public=self.x25519_pk,
            ed25519_public=bytes(self.signer.verify_key),
            key_epoch=1,
            not_before_ms=at - 60_000,
            not_after_ms=at + 3_600_000,
            models_root=binding.models_root([bytes.fromhex(MODEL)]),
            config_hash=bytes(32),
            gpu_evidence_hash=binding.NO_GPU,
            challenge=binding.challenge(root, self.provider_id, random),
        ).encode()
        covered, is_open = binding.report_data(claims), self.tee is TeeKind.NONE
        return ProviderEvidence(
            tee="none" if is_open else "tdx",
            provider_id=self.provider_id,
            quote=make_statement(self.identity, covered) if is_open
            else authority().platform(at).quote(covered),
            collateral=None if is_open else authority().collateral(at - 3_600_000),
            claims=claims,
            models=(MODEL,),
            checkpoint_root=root.hex(),
            challenge_random=random.hex(),
        )  # fmt: skip

    def entry(self) -> dict[str, Any]:
        """The provider as the directory lists it."""
        offer = {
            "name": "skills-1",
            "context_tokens": self.context_tokens,
            **self.quote.model_dump(mode="json"),
        }
        return {
            "provider_id": self.provider_id,
            "tier": self.tier,
            "evidence": self.evidence.model_dump(mode="json"),
            "bundles": [self.bundle.hex()],
            "offer": offer,
            "load": {"running": self.running, "concurrency": 8},
        }


@dataclass
class Faults:
    """What goes wrong. Each is one field, so that a test says what it is about."""

    refuse: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    refuse_repeats: tuple[int, dict[str, Any]] | None = None  # of a job that was posted before
    log: dict[str, Any] | None = None  # what is told of every job instead of the truth
    cut_after: int | None = None  # pieces sent before the line breaks
    cuts: int = 1  # how often it breaks
    stored: bool = True  # whether the whole response can be fetched afterwards
    forged_receipt: bool = False
    no_receipt: bool = False
    other_price: int = 0
    other_quote: bool = False
    other_epoch: bool = False
    other_provider: bool = False
    other_usage: bool = False
    refuse_disputes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    more_tokens: int = 0  # that the receipt and the usage claim beyond the answer's own
    flipped_byte: int | None = None  # index of the response piece that is changed on the way
    error: dict[str, Any] | None = None  # the enclave refuses with this error object
    status: Status = Status.COMPLETE
    slow_first: bool = False  # nothing leaves before `gate` is set
    slow_after: int | None = None  # pieces that leave before `gate` is waited for


@dataclass
class Ran:
    """One job as the gateway knows it."""

    envelope: bytes
    headers: dict[str, str]
    pieces: list[bytes]
    price: int
    posts: int = 1
    cancelled: bool = False
    traceparent: str = ""
    key: str = ""


class TestNetwork:
    """The gateway's state, and the ASGI application over it."""

    __test__ = False

    def __init__(self, *enclaves: Enclave) -> None:
        self.enclaves = list(enclaves) or [Enclave()]
        is_open = any(enclave.tee is TeeKind.NONE for enclave in enclaves)
        policy = dev_policy(authority(), NETWORK, open_tier=OPEN_TIER if is_open else None)
        self.signed = sign(policy, [bytes(POLICY_SIGNER)])
        self.faults = Faults()
        self.gate = threading.Event()
        self.cancelled = threading.Event()
        self.jobs: dict[str, Ran] = {}
        self.keys: dict[str, str] = {}
        self.bodies: list[bytes] = []
        self.seen: list[bytes] = []  # every request body, as it came in
        self.deleted: list[str] = []
        self.disputes: list[tuple[str, bytes]] = []  # job id and body
        self.directory_reads = 0
        self.documents: dict[str, bytes] = {}  # what is given as a model id's manifest
        self.url = ""

    @property
    def paid(self) -> int:
        return len(self.jobs)

    # ---- HTTP ----

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        document = self.documents.get(path.removeprefix("/v1/manifests/"))
        if document is not None:
            assert "authorization" not in headers, "a key was sent where none is needed"
            await _start(send, 200, {}, "application/json")
            await send({"type": "http.response.body", "body": document})
            return
        if headers.get("authorization") != f"Bearer {KEY}":
            await _json(send, 401, _error("Incorrect API key provided.", "invalid_api_key"))
        elif path == "/v1/models":
            models = [{"id": "skills-1", "object": "model", "created": 1, "owned_by": "cocoon"}]
            await _json(send, 200, {"object": "list", "data": models})
        elif path == "/v1/directory":
            await self._directory(scope, send)
        elif path == "/v1/jobs" and method == "POST":
            await self._post(headers, receive, send)
        elif path.endswith("/dispute") and method == "POST":
            self.disputes.append((path.split("/")[3], await _body(receive)))
            refusals = self.faults.refuse_disputes
            await _json(send, *(refusals.pop(0) if refusals else (201, {})))
        elif path.endswith("/response"):
            await self._stored(path.split("/")[3], headers, send)
        elif method == "DELETE":
            self.deleted.append(path.split("/")[3])
            await _json(send, 202, {})
        elif path.startswith("/v1/jobs/"):
            ran = self.jobs.get(path.split("/")[3])
            told = {"status": "settled", "price_nanoton": str(ran.price)} if ran else {}
            told = self.faults.log or told
            await _json(send, 200 if told else 404, told or _error("No such job.", "not_found"))
        else:
            await _json(send, 404, _error("Unknown path.", "unknown_url"))

    async def _directory(self, scope: Any, send: Any) -> None:
        self.directory_reads += 1
        if scope["query_string"] != b"model=skills-1":
            await _json(send, 404, _error("No such model.", "model_not_found"))
            return
        await _json(
            send,
            200,
            {
                "model": "skills-1",
                "policy": self.signed.model_dump(mode="json"),
                "providers": [enclave.entry() for enclave in self.enclaves],
            },
        )

    async def _post(self, headers: dict[str, str], receive: Any, send: Any) -> None:
        envelope = await _body(receive)
        self.seen.append(envelope)
        assert headers["content-type"] == "application/vnd.cocoon.cai1"
        if self.faults.refuse:
            status, body, more = self.faults.refuse.pop(0)
            await _json(send, status, body, more)
            return
        key = headers["idempotency-key"]
        job_id = self.keys.get(key)
        if job_id is None:
            try:
                ran = self._run(envelope)
            except LookupError:
                await _json(send, 409, _error("Refresh and seal again.", "reseal"))
                return
            ran.traceparent, ran.key = headers["traceparent"], key
            job_id = ran.headers["x-cocoon-job-id"]
            self.jobs[job_id], self.keys[key] = ran, job_id
        else:
            ran = self.jobs[job_id]
            if ran.envelope != envelope:
                await _json(send, 409, _error("Other request.", "idempotency_mismatch"))
                return
            ran.posts += 1
            if self.faults.refuse_repeats is not None:
                await _json(send, *self.faults.refuse_repeats)
                return
        await self._stream(ran, receive, send)

    async def _stream(self, ran: Ran, receive: Any, send: Any) -> None:
        gone = asyncio.create_task(_gone(receive))
        faults = self.faults
        try:
            if faults.slow_first and not await self._open_gate(gone, ran):
                return
            await _start(send, 200, ran.headers, "application/vnd.cocoon.cai1")
            for index, piece in enumerate(ran.pieces):
                if faults.slow_after == index and not await self._open_gate(gone, ran):
                    return
                if faults.cut_after == index and faults.cuts > 0:
                    faults.cuts -= 1
                    return  # uvicorn closes the connection without the chunked body's end
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()

    async def _open_gate(self, gone: asyncio.Task[None], ran: Ran) -> bool:
        """Wait until the test opens the gate; False when the client left before."""
        for _ in range(3000):
            if self.gate.is_set():
                return True
            if gone.done():
                ran.cancelled = True
                self.cancelled.set()
                return False
            await asyncio.sleep(0.01)
        raise AssertionError("the test never opened the gate")

    async def _stored(self, job_id: str, headers: dict[str, str], send: Any) -> None:
        ran = self.jobs.get(job_id)
        if ran is None or not self.faults.stored:
            await _json(send, 404, _error("Not stored.", "not_found"))
            return
        start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        await _start(send, 206, {}, "application/vnd.cocoon.cai1")
        await send({"type": "http.response.body", "body": b"".join(ran.pieces)[start:]})

    # ---- the enclave ----

    def _run(self, envelope: bytes) -> Ran:
        header, _ = parse_header(envelope)
        wanted = set(header.key_ids)
        able = (item for item in self.enclaves if item.ring.key_ids() & wanted)
        enclave = next(able, None)
        if enclave is None:
            raise LookupError
        opened = open_request(
            envelope, keys=enclave.ring, resp_eph_sk=secrets.token_bytes(32), now_ms=now_ms(),
            policy_hashes={policy_hash(self.signed.policy)},
            model_ids={bytes.fromhex(MODEL)},
        )  # fmt: skip
        self.bodies.append(opened.body)
        quote = enclave.quote
        pieces, price = self._respond(enclave, opened)
        faults = self.faults
        cheaper = quote.model_copy(update={"output_nanoton_per_mtok": 1})
        told = cheaper if faults.other_quote else quote
        nobody = "prov_" + "0" * 32
        headers = {
            "x-cocoon-job-id": opened.header.job_id.hex(),
            "x-cocoon-provider": nobody if faults.other_provider else enclave.provider_id,
            "x-cocoon-epoch": "2" if faults.other_epoch else "1",
            "x-cocoon-quote": told.to_canonical().decode(),
            "x-cocoon-quote-id": pricing.quote_id(told),
            "x-cocoon-evidence-id": enclave.evidence_id.hex(),
        }
        return Ran(envelope, headers, pieces, price)

    def _respond(self, enclave: Enclave, opened: OpenedRequest) -> tuple[list[bytes], int]:
        """The whole sealed response, a piece per record, and its price."""
        faults, header = self.faults, opened.header
        request = parse_chat_request(opened.body)
        answer = Answer(header.job_id.hex(), 1_790_000_000, "fp_test", request)
        usage = TokenUsage(prompt=11, completion=7 + faults.more_tokens, cached=2)
        sealer = ResponseSealer(opened)
        pieces = [sealer.prefix()]
        if faults.error is not None:
            pieces.append(sealer.error(to_json(faults.error)))
            usage = TokenUsage(0, 0)
        elif header.stream:
            chunks = [answer.role_chunk(), *(answer.delta_chunk(word) for word in WORDS)]
            chunks.append(answer.final_chunk("stop"))
            if request.include_usage:
                chunks.append(answer.usage_chunk(usage))
            pieces += [sealer.data(to_json(chunk)) for chunk in chunks]
        else:
            pieces.append(sealer.data(to_json(answer.completion(TEXT, "stop", usage))))
        if faults.error is None:
            told = replace(usage, prompt=usage.prompt + 300) if faults.other_usage else usage
            pieces.append(sealer.usage(to_json(told.to_openai())))
        status = Status.REFUSED if faults.error is not None else faults.status
        if faults.no_receipt:
            frame = sealer._frames.seal(RecordType.DATA, b"{}", final=True)
            return [*pieces, frame], 0
        counts = pricing.TokenCounts(
            input=public_count(header.profile, usage.prompt, header.max_input_tokens),
            cached_input=0,
            output=public_count(header.profile, usage.completion, header.max_output_tokens),
            reasoning=0,
        )
        counts = replace(
            counts, cached_input=public_count(header.profile, usage.cached, counts.input)
        )
        free = status in (Status.REFUSED, Status.FAILED)
        price = 0 if free else pricing.price(enclave.quote, counts) + faults.other_price
        receipt = sealer.receipt(
            status=status, epoch=1, quote_id=bytes.fromhex(pricing.quote_id(enclave.quote)),
            input_tokens=counts.input, cached_input_tokens=counts.cached_input,
            output_tokens=counts.output, reasoning_tokens=0, price_nanoton=price,
            opened_ms=now_ms(), first_ms=now_ms(), last_ms=now_ms(),
            evidence_id=enclave.evidence_id, seq=0, prev_receipt_hash=bytes(32),
        )  # fmt: skip
        signer = POLICY_SIGNER if faults.forged_receipt else enclave.signer
        pieces.append(sealer.finish(receipt.sign(signer)))
        if faults.flipped_byte is not None:
            piece = bytearray(pieces[faults.flipped_byte])
            piece[-1] ^= 1
            pieces[faults.flipped_byte] = bytes(piece)
        return pieces, price


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


async def _body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Any, status: int, headers: dict[str, str], content_type: str) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    encoded.append((b"content-type", content_type.encode()))
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def _json(
    send: Any, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
) -> None:
    await _start(send, status, headers or {}, "application/json")
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


@contextmanager
def served(app: Any, *, lifespan: str = "off") -> Iterator[str]:
    """Run an ASGI application in uvicorn on a free loopback port; yields its base URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, lifespan=lifespan, log_config=None, access_log=False,
        log_level="critical", timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(1000):
            if server.started:
                break
            time.sleep(0.01)
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class Counting:
    """verify_provider, counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return verify_provider(*args)
