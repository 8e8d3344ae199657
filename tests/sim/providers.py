"""Providers of the simulated network: the agent's own Jobs, Submitter, Handlers and Heart over a
model of the enclave and of the disk. Some providers are rogues and forge receipts.

An envelope is not sealed here; it names the keys that may open it, and nobody else tries.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from cocoon.agent import ModelConfig, ModelPrice
from cocoon.chat import ENDPOINT, TokenUsage
from cocoon.contracts.commands import (
    AttestProvider,
    EnrolProvider,
    PublishKeyBundle,
    PublishOffer,
    PublishProfile,
    RevokeAttestation,
)
from cocoon.contracts.events import ProfiledModel
from cocoon.domain.pricing import quote_id
from cocoon.kernel.errors import SealingError
from cocoon.kernel.ids import provider_id
from cocoon.models.manifest import describe_server
from cocoon.sealing import ReplayMemory, Status
from cocoon.sealing.envelope import RecipientSlot, RequestHeader
from cocoon.sealing.receipt import CHAIN_START, Receipt, receipt_hash
from services.provider.answering import bill
from services.provider.frames import FrameSender
from services.provider.handlers import Handlers
from services.provider.heartbeat import Heart
from services.provider.jobs import Jobs
from services.provider.journal import Journal, Segment
from services.provider.models import ServedModel
from services.provider.queueing import Engine
from services.provider.running import RunningJob, SealedResult
from services.provider.spool import Spool
from services.provider.submitting import Submitter
from services.provider.table import ModelTable
from tests.sim.bus import Nats
from tests.support.job_world import MODEL, OFFERED, POLICY, bytes32, hex16, hex32

if TYPE_CHECKING:
    from tests.sim.world import SimClock, World

PRICE = ModelPrice(
    input=OFFERED.input_nanoton_per_mtok, cached_input=OFFERED.cached_input_nanoton_per_mtok,
    output=OFFERED.output_nanoton_per_mtok,
)  # fmt: skip
KEY_LIFE_MS = 600_000


class NoEngine:
    """Stands where the engine is made: SimRun says what an answer is."""

    context_tokens = request_tokens = OFFERED.context_tokens


def served_model(concurrency: int, clock: SimClock) -> ServedModel:
    config = ModelConfig(name="skills-1", concurrency=concurrency, price=PRICE)
    make: Any = NoEngine
    manifest = describe_server(config.name, {})  # published by nobody here; MODEL is drawn
    return ServedModel(config, MODEL, Engine(make, concurrency), clock, manifest=manifest)


def envelope_of(header: RequestHeader, salt: str) -> bytes:
    return json.dumps(
        [
            header.job_id.hex(), header.max_price_nanoton, header.max_input_tokens,
            header.max_output_tokens, header.not_after_ms, header.flags,
            [key.hex() for key in header.key_ids], salt,
        ]
    ).encode()  # fmt: skip


def header_of(envelope: bytes) -> RequestHeader:
    job, price, max_input, max_output, not_after, flags, keys, _ = json.loads(envelope)
    return RequestHeader(
        bytes.fromhex(job), bytes.fromhex(MODEL), price, max_input, max_output, not_after,
        bytes.fromhex(POLICY), flags,
        tuple(RecipientSlot(bytes.fromhex(key), bytes32(key), b"") for key in keys),
    )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """What an enclave knows of a request (cocoon.sealing.OpenedRequest, without its keys)."""

    header: RequestHeader
    slot: RecipientSlot
    req_hash: bytes
    endpoint: str = ENDPOINT


@dataclass(eq=False, slots=True)
class ModelSegment(Segment):
    """A file in memory, of which `synced` bytes outlive the machine."""

    data: bytearray = field(default_factory=bytearray)
    synced: int = 0

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])


class ModelJournal(Journal):
    """The journal over a disk in memory, `files`, which outlives the process."""

    def __init__(self, world: World, files: dict[int, ModelSegment]) -> None:
        super().__init__(Path("spool"))
        self._world, self._files = world, files

    def open(self) -> Iterator[tuple[Segment, bytes]]:
        for number, file in sorted(self._files.items()):
            kept = self._world.random.randint(file.synced, len(file.data))
            segment = ModelSegment(file.path, kept, data=bytearray(file.data[:kept]), synced=kept)
            self._files[number] = segment
            self._number = number
            self.segments.append(segment)
            self.disk_bytes += kept
            yield segment, bytes(segment.data)

    def append(self, data: bytes, *, durable: bool = True) -> tuple[Segment, int]:
        if durable and self._world.faults.happens("disk_full"):
            raise OSError("no space left on device")
        if self._growing is None:
            self._number += 1
            self._growing = self._number
            self._files[self._number] = ModelSegment(Path(str(self._number)))
            self.segments.append(self._files[self._number])
        segment = self._files[self._growing]
        offset = len(segment.data)
        segment.data += data
        segment.size = len(segment.data)
        self.disk_bytes += len(data)
        if durable:
            segment.synced = segment.size
        return segment, offset

    def close(self) -> None:
        self._growing = None

    def remove(self, segment: Segment) -> None:
        if segment is self.growing:
            self.close()
        self.segments.remove(segment)
        self.disk_bytes -= segment.size
        self._files.pop(int(segment.path.name), None)


@dataclass
class ModelSpool(Spool):
    """The agent's own spool over that disk."""

    world: Any = None
    files: dict[int, ModelSegment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._journal = ModelJournal(self.world, self.files)

    def reopened(self) -> ModelSpool:
        """As a new process finds it."""
        spool = ModelSpool(
            self.folder, self.max_items, self.max_bytes, world=self.world, files=self.files
        )
        spool.open()
        return spool


class Enclave:
    """One boot: its key, its receipts' chain and its memory of what it ran."""

    def __init__(self, agent: Agent, clock: SimClock) -> None:
        self.agent, self.clock = agent, clock
        self.signer = SigningKey(bytes32(f"signer {agent.name} {agent.boots}"))
        self.key_id = hex16(f"key {agent.name} {agent.boots}")
        self.evidence_id = hex32(f"evidence {agent.name} {agent.boots}")
        self.replay: ReplayMemory[str] = ReplayMemory()
        self._sequence, self._previous = 0, CHAIN_START

    async def open(self, envelope: bytes, *, req_hash: bytes) -> tuple[Opened, bytes]:
        await asyncio.sleep(self.agent.random.uniform(0.0003, 0.002))
        if hashlib.sha256(envelope).digest() != req_hash:
            raise SealingError("Not the named envelope.", code="bad_request")
        header = header_of(envelope)
        slot = next((s for s in header.recipients if s.key_id.hex() == self.key_id), None)
        if slot is None:
            raise SealingError("This enclave does not hold that key.", code="unknown_key")
        if self.clock.now_ms() > header.not_after_ms:
            raise SealingError("The request's time is over.", code="expired")
        return Opened(header, slot, req_hash), bytes.fromhex(self.evidence_id)

    def sign(self, job: RunningJob, status: Status, usage: TokenUsage, response: bytes) -> bytes:
        header = job.opened.header
        account = bill(status, usage, header, job.quote)
        now_ms = self.clock.now_ms()
        receipt = Receipt(
            status=status, job_id=header.job_id, epoch=job.route.epoch,
            key_id=bytes.fromhex(self.key_id), model_id=header.model_id,
            quote_id=bytes.fromhex(quote_id(job.quote)), req_hash=job.opened.req_hash,
            resp_hash=hashlib.sha256(response).digest(), prompt_commit=bytes(32),
            output_commit=bytes(32), input_tokens=account.counts[0],
            cached_input_tokens=account.counts[1], output_tokens=account.counts[2],
            reasoning_tokens=account.counts[3], price_nanoton=account.price_nanoton,
            opened_ms=min(job.opened_ms, now_ms), first_ms=now_ms, last_ms=now_ms,
            evidence_id=job.evidence_id, seq=self._sequence, prev_receipt_hash=self._previous,
        )  # fmt: skip
        signer = self.signer
        if self.agent.world.faults.happens("forgery"):
            receipt, signer = self._forged(receipt)
            self.agent.world.forged.add(hashlib.sha256(response).hexdigest())
        raw = receipt.sign(signer)
        self._sequence, self._previous = self._sequence + 1, receipt_hash(raw)
        return raw

    def _forged(self, receipt: Receipt) -> tuple[Receipt, SigningKey]:
        changes: list[dict[str, Any]] = [
            {}, {"price_nanoton": receipt.price_nanoton + 1}, {"output_tokens": 2**20},
            {"quote_id": bytes32("another")}, {"req_hash": bytes32("another")},
            {"epoch": receipt.epoch + 1}, {"job_id": bytes32("another")[:16]},
            {"evidence_id": bytes32("another")}, {"key_id": bytes32("another")[:16]},
        ]  # fmt: skip
        change = self.agent.random.choice(changes)
        stranger = SigningKey(bytes32("stranger"))
        return replace(receipt, **change), self.signer if change else stranger


class SimRun:
    """services.provider.running.JobRun with an engine that needs time and says random bytes."""

    def __init__(
        self,
        job: RunningJob,
        enclave: Enclave,
        served: object,
        send: Any,
        clock: Any,
        **_: object,
    ) -> None:
        self._job, self._enclave, self._send = job, enclave, send
        self._stopped = asyncio.Event()

    def begin(self) -> None:
        self._job.on_cancel = self._stopped.set
        if self._job.cancelled:
            self._stopped.set()

    async def run(self) -> SealedResult:
        job, source = self._job, self._enclave.agent.random
        pieces = source.choice((0, 1, 2, 3, 5))
        pace_s = source.choice((0.01, 0.05, 0.3, 1.5))
        told = 0
        for _ in range(pieces):
            if await self._cancelled_within(source.uniform(0, 2 * pace_s)):
                break
            told += 20
            await self._put(source.randbytes(source.randrange(1, 24)))
        await self._cancelled_within(source.uniform(0, pace_s))
        status = source.choice((Status.COMPLETE, Status.COMPLETE, Status.LENGTH, Status.FAILED))
        if self._stopped.is_set():
            status = Status.CANCELLED
        usage = TokenUsage(100, told, 20, 0) if told else TokenUsage(0, 0)
        offset = 0 if job.rerouted else len(job.whole)
        job.whole += source.randbytes(16)
        response = bytes(job.whole)
        receipt = self._enclave.sign(job, status, usage, response)
        counts = (usage.prompt, usage.cached, usage.completion, usage.reasoning)
        return SealedResult(
            job.job_id, job.route.epoch, job.opened.req_hash, response, receipt, status, offset,
            None, counts,
        )  # fmt: skip

    async def _cancelled_within(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._stopped.wait()
        except TimeoutError:
            return False
        return True

    async def _put(self, data: bytes) -> None:
        job = self._job
        offset = len(job.whole)
        job.whole += data
        if job.rerouted:
            job.rerouted = False
            offset, data = 0, bytes(job.whole)
        await self._send(job.job_id, job.route, offset, data, None)


class Agent:
    """A provider's machine: what survives its process, and how that is started."""

    def __init__(self, world: World, name: str, concurrency: int) -> None:
        self.world, self.name, self.concurrency = world, name, concurrency
        self.random: random.Random = world.random
        self.identity = SigningKey(bytes32(f"identity {name}"))
        self.id = provider_id(bytes(self.identity.verify_key))
        self.boots = 0
        self.clock = world.new_clock()
        self.spool = ModelSpool(Path("spool"), 100, 2**20, world=world)
        self.enclave: Enclave | None = None

    async def run(self) -> None:
        """One process from its start to its death."""
        world = self.world
        self.boots += 1
        nc: Any = Nats(world.bus, world.process_of(self))
        self.spool = self.spool.reopened()
        submitter = Submitter(
            nc, self.spool, self.identity, self.id, self.clock, first_backoff_s=2.0
        )
        submitter.adopt()
        enclave: Any = Enclave(self, self.clock)
        self.enclave = enclave
        models = ModelTable([served_model(self.concurrency, self.clock)], self.clock, grace_s=120)
        jobs = Jobs(
            nc, self.id, enclave, models, self.spool, submitter, FrameSender(nc, self.id),
            self.clock, job_timeout_s=60.0,
        )  # fmt: skip
        handlers = Handlers(nc, self.id, jobs, submitter)
        await handlers.listen_to_acks()
        heart = Heart(
            nc, self.id, hex16(f"{self.name} boot {self.boots}"),
            lambda: [*jobs.running_pairs(), *submitter.unsettled(600.0)],
            lambda: not jobs.taking_jobs, models.room, interval_s=1.0,
        )  # fmt: skip
        await handlers.listen_to_jobs()
        await asyncio.sleep(self.random.uniform(0.05, 0.5))
        self.announce()
        async with asyncio.TaskGroup() as group:
            group.create_task(submitter.run())
            group.create_task(heart.run())

    # ---- what attestation appends to shard 0 about it ----

    def announce(self) -> None:
        enclave = self.enclave
        assert enclave is not None
        now_ms = self.world.clock.now_ms()
        until_ms = now_ms + KEY_LIFE_MS
        self.world.decide_in_network(
            EnrolProvider(
                provider_id=self.id, identity_key=bytes(self.identity.verify_key).hex(),
                tier="simulated",
            ),
            PublishOffer(
                provider_id=self.id, models=(OFFERED,), concurrency=self.concurrency
            ),
            PublishProfile(
                provider_id=self.id, region=f"sim-{self.name}",
                models=(ProfiledModel(model_id=MODEL, quantisation="int8"),),
            ),
            AttestProvider(
                provider_id=self.id, evidence_id=enclave.evidence_id, verdict="ok",
                assurance="simulated", signing_key=bytes(enclave.signer.verify_key).hex(),
                models_root=hex32("models"), valid_until_ms=until_ms,
                collateral_hash=hex32("collateral"), policy_hash=POLICY,
            ),
            PublishKeyBundle(
                provider_id=self.id, key_id=enclave.key_id, evidence_id=enclave.evidence_id,
                not_before_ms=now_ms - 1000, not_after_ms=until_ms, bundle="00",
            ),
        )  # fmt: skip

    def revoke(self) -> None:
        if self.enclave is not None:
            self.world.decide_in_network(
                RevokeAttestation(
                    provider_id=self.id, evidence_id=self.enclave.evidence_id, reason="ban"
                )
            )
