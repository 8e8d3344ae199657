"""A small network around one real agent: attestation's verbs, a gateway and billing, on real NATS.

Evidence and bundles are checked by the real verifiers, answers are opened by the real client code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey, VerifyKey
from nats.aio.client import Client
from nats.aio.msg import Msg

from cocoon.bus.ingress import Incoming, IngressWorker
from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.bus.permissions import INGRESS_DURABLE
from cocoon.bus.sealed import put_sealed
from cocoon.bus.service import Stop
from cocoon.bus.streams import declare_ingress_consumer
from cocoon.contracts import messages as m
from cocoon.contracts import subjects
from cocoon.contracts.events import OfferedModel, Quote
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.domain.pricing import greatest_price, quote_id
from cocoon.evidence import claims as binding
from cocoon.evidence.claims import Claims
from cocoon.evidence.collateral import CollateralFloors
from cocoon.evidence.policy import policy_hash, sign
from cocoon.evidence.provider import ProviderEvidence, parse_evidence, verify_provider
from cocoon.evidence.trust import trust_document
from cocoon.kernel import canonical
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import CocoonError, Forbidden
from cocoon.sealing import (
    Data,
    ErrorRecord,
    Finished,
    KeyBundle,
    Profile,
    Receipt,
    Recipient,
    RequestHeader,
    ResponseOpener,
    SealedRequest,
    Usage,
    default_profile,
    pack_flags,
    seal_request,
    verify_bundle,
)
from services.provider import main as agent_main
from services.provider.frames import DISPATCHED, LAST, MORE
from services.provider.settings import ProviderSettings
from tests.support.servers import Bus

NETWORK = "dev-test"
WAIT_S = 20.0
FEE_BPS = 500
# an answer that goes on to its bound: the model's own end tokens are banned
ENDLESS: dict[str, Any] = {
    "max_output": 600,
    "stream": True,
    "profile": Profile.P3,
    "logit_bias": {str(token): -100 for token in range(256, 260)},
}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Job:
    """One dispatched request and what came back."""

    sealed: SealedRequest
    quote: Quote
    epoch: int
    frames: dict[int, bytes] = field(default_factory=dict)
    blob_hash: bytes = b""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Queue[m.DispatchReply] = field(default_factory=asyncio.Queue)

    @property
    def job_id(self) -> str:
        return self.sealed.secrets.header.job_id.hex()

    def response(self) -> bytes:
        """The bytes in order; asserts that there is no gap and that the hash is right."""
        whole = b""
        for offset in sorted(self.frames):
            assert offset <= len(whole), "a gap"
            whole = whole[:offset] + self.frames[offset]
        assert hashlib.sha256(whole).digest() == self.blob_hash
        return whole


@dataclass
class Opened:
    """A response as the client reads it."""

    data: list[bytes]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    receipt: Receipt
    raw_receipt: bytes

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(item) for item in self.data]

    @property
    def text(self) -> str:
        if len(self.data) == 1 and "message" in self.objects[0]["choices"][0]:
            return str(self.objects[0]["choices"][0]["message"]["content"])
        return "".join(
            item["choices"][0]["delta"].get("content", "")
            for item in self.objects
            if item["choices"]
        )


class ProviderWorld:
    """Everything that one agent talks to."""

    def __init__(self, bus: Bus, folder: Path) -> None:
        self.bus = bus
        self.folder = folder
        self.provider_id = bus.providers[0]
        self.gateway_id = bus.gateways[0]
        self.authority = DevAuthority.create(now_ms())
        self._signer = SigningKey(secrets.token_bytes(32))
        self.trust = dev_trust(self.authority, NETWORK, bytes(self._signer.verify_key), bytes(32))
        self.policy_version = 0
        self.bundles: list[KeyBundle] = []
        self.signing_keys: dict[bytes, bytes] = {}  # key_id -> attested Ed25519 key
        self.offer: OfferedModel | None = None  # the first of the last offer
        self.offers: list[m.OfferRequest] = []
        self.unproved: list[m.OfferRequest] = []  # refused: the evidence does not cover them
        self.profile_faults: list[CocoonError] = []
        self.evidence: list[ProviderEvidence] = []
        self.attested: dict[bytes, bytes] = {}  # evidence id -> Ed25519 key
        self.submitted: list[m.SubmitResult] = []
        self.heartbeats: list[m.Heartbeat] = []
        self.jobs: dict[tuple[str, int], Job] = {}
        self.acknowledge = True
        self.announcements_open = asyncio.Event()
        self.announcements_open.set()
        self._challenge = (bytes(32), bytes(32))
        self._billing: asyncio.Task[None] | None = None
        self.write_policy()

    def write_policy(self) -> None:
        self.policy_version += 1
        policy = dev_policy(self.authority, NETWORK, version=self.policy_version)
        self.signed_policy = sign(policy, [bytes(self._signer)])
        self.policy_hash = policy_hash(policy)
        self.authority.save(self.folder / "authority.json")
        (self.folder / "trust.json").write_bytes(trust_document(self.trust))
        (self.folder / "policy.json").write_bytes(self.signed_policy.to_canonical())

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "nats_url": self.bus.server.url,
            "nats_seed_file": self.bus.seed_file(self.provider_id),
            "data_dir": self.folder / "provider",
            "trust_file": self.folder / "trust.json",
            "environment": "dev",
            "dev_authority_file": self.folder / "authority.json",
            "submit_backoff_s": 0.3,
            "heartbeat_s": 0.2,
            "drain_s": 5.0,
            "flush_s": 0.3,
            "log_level": "error",
            **changes,
        }

    # ---- attestation, gateway and billing ----

    async def start(self) -> None:
        self.attestation = await self.bus.connect("attestation")
        self.gateway = await self.bus.connect("gateway")
        self.billing = await self.bus.connect("billing")
        self.matcher = await self.bus.connect("matcher")
        await self.attestation.subscribe("rpc.attestation.>", cb=self._on_attestation)
        await self.gateway.subscribe(f"tok.{self.gateway_id}.>", cb=self._on_frame)
        await self.matcher.subscribe(subjects.HEARTBEATS, cb=self._on_heartbeat)
        for client in (self.attestation, self.gateway, self.matcher):
            await client.flush()
        self._billing = asyncio.create_task(self._settle())

    async def close(self) -> None:
        if self._billing is not None:
            self._billing.cancel()
            await asyncio.gather(self._billing, return_exceptions=True)

    async def _on_attestation(self, message: Msg) -> None:
        verb = message.subject.split(".")[-1]
        try:
            data = getattr(self, f"_do_{verb}")(message.data)
            reply = m.Reply(ok=True, data=canonical.dumps(data).decode())
        except CocoonError as error:
            body = m.ErrorBody(status=error.http_status, code=error.code, message=error.message)
            reply = m.Reply(ok=False, error=body)
        if verb == "publish_bundle":
            await self.announcements_open.wait()
        await message.respond(reply.model_dump_json().encode())

    def _do_enrol(self, body: bytes) -> dict[str, Any]:
        request = m.EnrolRequest.model_validate_json(body)
        seed = read_seed_file(self.bus.seed_file(self.provider_id))
        assert request.identity_key == raw_public(seed).hex()
        return {"provider_id": self.provider_id, "tier": "simulated"}

    def _do_challenge(self, _body: bytes) -> dict[str, Any]:
        root, random = secrets.token_bytes(32), secrets.token_bytes(32)
        self._challenge = (root, random)
        made = binding.challenge(root, self.provider_id, random)
        return m.Challenge(
            challenge=made.hex(), checkpoint_root=root.hex(), challenge_random=random.hex(),
            expires_ms=now_ms() + 60_000,
        ).model_dump(mode="json")  # fmt: skip

    def _do_submit_evidence(self, body: bytes) -> dict[str, Any]:
        evidence = parse_evidence(body)
        assert evidence.checkpoint_root == self._challenge[0].hex()
        verdict = verify_provider(
            evidence, self.trust, self.signed_policy, CollateralFloors(), now_ms()
        )
        assert verdict.ok, str(verdict)
        assert verdict.evidence_id is not None
        self.evidence.append(evidence)
        self.attested[verdict.evidence_id] = Claims.decode(evidence.claims).ed25519_public
        return {
            "verdict": str(verdict), "assurance": "simulated",
            "evidence_id": verdict.evidence_id.hex(),
            "valid_until_ms": verdict.valid_until_ms, "position": 1,
        }  # fmt: skip

    def _do_publish_bundle(self, body: bytes) -> dict[str, Any]:
        raw = bytes.fromhex(m.BundleRequest.model_validate_json(body).bundle)
        evidence_id, key = list(self.attested.items())[-1]
        bundle = verify_bundle(raw, ed25519_pk=key, evidence_id=evidence_id, now_ms=now_ms())
        self.bundles.append(bundle)
        self.signing_keys[bundle.key_id] = key
        return {"key_id": bundle.key_id.hex(), "position": 2}

    def _do_publish_offer(self, body: bytes) -> dict[str, Any]:
        offer = m.OfferRequest.model_validate_json(body)
        if not {model.model_id for model in offer.models} <= set(self.evidence[-1].models):
            self.unproved.append(offer)
            raise Forbidden("the evidence does not cover one of these", code="models_mismatch")
        self.offers.append(offer)
        self.offer = offer.models[0]
        return {"position": 3}

    def _do_publish_profile(self, body: bytes) -> dict[str, Any]:
        if self.profile_faults:
            raise self.profile_faults.pop()
        self.profile = m.ProfileRequest.model_validate_json(body)
        return {"position": 4}

    def _do_standing(self, _body: bytes) -> dict[str, Any]:
        return {"attested": bool(self.evidence), "banned": False, "revoked": None}

    async def _on_heartbeat(self, message: Msg) -> None:
        self.heartbeats.append(m.Heartbeat.model_validate_json(message.data))

    async def _on_frame(self, message: Msg) -> None:
        _, _, provider, job_id, epoch = message.subject.split(".")
        assert provider == self.provider_id
        job = self.jobs.get((job_id, int(epoch)))
        if job is None:
            return
        kind, offset = message.data[0], int.from_bytes(message.data[1:9], "big")
        if kind == DISPATCHED:
            job.answered.put_nowait(m.DispatchReply.model_validate_json(message.data[1:]))
            return
        assert kind in (MORE, LAST)
        start = 41 if kind == LAST else 9
        blob_hash, data = message.data[9:start], message.data[start:]
        job.frames[offset] = data
        job.began.set()
        if kind == LAST:
            job.blob_hash = blob_hash
            job.ended.set()

    async def _settle(self) -> None:
        """Billing's part: check the identity's signature, acknowledge."""
        identity = VerifyKey(raw_public(read_seed_file(self.bus.seed_file(self.provider_id))))

        async def take(incoming: Incoming) -> None:
            result = m.SubmitResult.model_validate_json(incoming.body)
            identity.verify(result.signed_bytes(), bytes.fromhex(result.signature))
            self.submitted.append(result)
            if self.acknowledge:
                await self.send_ack(result)

        await IngressWorker(
            self.billing, subjects.INGRESS_STREAM, INGRESS_DURABLE, take,
            declare=declare_ingress_consumer, workers=1,
        ).run()  # fmt: skip

    async def send_ack(self, result: m.SubmitResult) -> None:
        ack = m.ResultAck(job_id=result.job_id, epoch=result.epoch, outcome="result_sealed")
        await self.billing.publish(subjects.acks(self.provider_id), ack.to_canonical())

    # ---- a client ----

    def quote(self, model: str | None = None) -> Quote:
        """What the network would match at now: the last offer's terms of a model, by its name."""
        offer = self.offer
        if model is not None:
            offer = next((one for one in self.offers[-1].models if one.name == model), None)
        assert offer is not None, model
        return Quote(
            model_id=offer.model_id,
            input_nanoton_per_mtok=offer.input_nanoton_per_mtok,
            cached_input_nanoton_per_mtok=offer.cached_input_nanoton_per_mtok,
            output_nanoton_per_mtok=offer.output_nanoton_per_mtok,
            fee_bps=FEE_BPS,
        )

    def seal(
        self, text: str = "Count from 1 to 9", *, stream: bool = False,
        profile: Profile | None = None, max_input: int = 400, max_output: int = 64,
        bundle: KeyBundle | None = None, job_id: bytes | None = None, body: bytes | None = None,
        endpoint: str = "/v1/chat/completions", header: dict[str, Any] | None = None,
        of: str | None = None, **parameters: Any,
    ) -> SealedRequest:  # fmt: skip
        bundle = bundle or self.bundles[-1]
        quote = self.quote(of)
        request = {
            "model": of or "skills-1",
            "messages": [{"role": "user", "content": text}],
            "stream": stream,
            **parameters,
        }
        if profile is None:
            profile = default_profile(stream=stream)
        fields: dict[str, Any] = {
            "job_id": job_id or secrets.token_bytes(16),
            "model_id": bytes.fromhex(quote.model_id),
            "max_price_nanoton": greatest_price(quote, max_input, max_output),
            "max_input_tokens": max_input,
            "max_output_tokens": max_output,
            "not_after_ms": bundle.not_after_ms,
            "policy_hash": self.policy_hash,
            "flags": pack_flags(profile, stream=stream),
        }
        return seal_request(
            header=RequestHeader(**{**fields, **(header or {})}),
            recipients=[Recipient.of(bundle.x25519_pk)],
            endpoint=endpoint,
            body=body if body is not None else json.dumps(request).encode(),
            randomness=SystemRandomness(),
        )

    async def dispatch(
        self, sealed: SealedRequest, *, epoch: int = 1, quote: Quote | None = None,
        gateway: str | None = None, through_sealed: bool = False, **headers: str,
    ) -> tuple[m.DispatchReply, Job]:  # fmt: skip
        quote = quote or self.quote()
        job = Job(sealed, quote, epoch)
        sent = {
            m.H_JOB: job.job_id,
            m.H_EPOCH: str(epoch),
            m.H_REQ_HASH: sealed.secrets.req_hash.hex(),
            m.H_GATEWAY: gateway or self.gateway_id,
            m.H_QUOTE: quote.to_canonical().decode(),
            **headers,
        }
        body = sealed.envelope
        if through_sealed:
            js = self.gateway.jetstream()
            sent[m.H_SEALED] = await put_sealed(js, self.provider_id, sealed.envelope)
            body = b""
        self.jobs[(job.job_id, epoch)] = self.jobs[(sent[m.H_JOB], epoch)] = job
        await self.gateway.publish(subjects.run_job(self.provider_id), body, headers=sent)
        return await asyncio.wait_for(job.answered.get(), WAIT_S), job

    async def accepted(self, sealed: SealedRequest, **options: Any) -> Job:
        reply, job = await self.dispatch(sealed, **options)
        assert reply.accepted, reply.code
        return job

    async def ended(self, job: Job) -> Opened:
        async with asyncio.timeout(WAIT_S):
            await job.ended.wait()
        return self.open(job)

    async def ask(self, text: str = "Count from 1 to 9", **options: Any) -> Opened:
        return await self.ended(await self.accepted(self.seal(text, **options)))

    async def cancel(self, job: Job) -> None:
        cancel = m.CancelJob(job_id=job.job_id, epoch=job.epoch)
        await self.gateway.publish(subjects.cancel_job(self.provider_id), cancel.to_canonical())

    def open(self, job: Job) -> Opened:
        opener = ResponseOpener(
            job.sealed.secrets, self.signing_keys,
            quote_id=bytes.fromhex(quote_id(job.quote)), epoch=job.epoch,
        )  # fmt: skip
        data, usage, error = [], None, None
        finished: Finished | None = None
        for event in opener.feed(job.response()):
            match event:
                case Data(content):
                    data.append(content)
                case Usage(content):
                    usage = json.loads(content)
                case ErrorRecord(content):
                    error = json.loads(content)["error"]
                case Finished():
                    finished = event
        opener.close()
        assert finished is not None
        return Opened(data, usage, error, finished.receipt, finished.raw)

    async def until(self, condition: Any, what: str) -> None:
        """Wait for a condition; fails with its name."""
        for _ in range(int(WAIT_S / 0.02)):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {WAIT_S} s: {what}")

    # ---- the agent ----

    @contextlib.asynccontextmanager
    async def agent(self, **changes: Any) -> AsyncIterator[Stop]:
        """The agent on this event loop, until the block ends (a clean stop)."""
        stop = Stop()
        known = len(self.bundles)
        settings = ProviderSettings(**self.settings(**changes))
        task = asyncio.create_task(agent_main.serve(settings, stop))
        try:
            await self.until(
                lambda: task.done() or (len(self.bundles) > known and self.offer), "announced"
            )
            if task.done():
                task.result()
            yield stop
        finally:
            stop()
            await asyncio.wait_for(task, WAIT_S)
            assert stop.error is None
            assert not self.unproved, "offered before it is proved"

    async def process(self, **changes: Any) -> asyncio.subprocess.Process:
        """The agent as its own process, ready."""
        known = len(self.bundles)
        values = {
            f"COCOON_PROVIDER_{key.upper()}": str(value)
            for key, value in self.settings(**changes).items()
        }
        with (self.folder / "agent.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.provider", stdout=asyncio.subprocess.PIPE,
                stderr=log, env={**os.environ, **values},
            )  # fmt: skip
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), WAIT_S)
        assert line, (self.folder / "agent.log").read_text()
        assert json.loads(line)["ready"] == "provider"
        assert len(self.bundles) > known
        return process


async def end(process: asyncio.subprocess.Process, number: int = signal.SIGTERM) -> int:
    """End a process that this test started."""
    if process.returncode is None:
        process.send_signal(number)
    return await asyncio.wait_for(process.wait(), WAIT_S)


@contextlib.asynccontextmanager
async def provider_world(bus: Bus, folder: Path) -> AsyncIterator[ProviderWorld]:
    world = ProviderWorld(bus, folder)
    await world.start()
    try:
        yield world
    finally:
        await world.close()


__all__ = ["ENDLESS", "Client", "Job", "Opened", "ProviderWorld", "end", "provider_world"]
