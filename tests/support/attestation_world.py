"""The attestation service in this process over real NATS and Postgres, and its providers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from nacl.signing import SigningKey
from nats.aio.client import Client

from cocoon.bus import keys
from cocoon.bus.requests import ask
from cocoon.bus.service import Stop
from cocoon.contracts import subjects
from cocoon.contracts.events import OfferedModel, ProfiledModel
from cocoon.contracts.messages import (
    BundleRequest,
    Challenge,
    EnrolRequest,
    Heartbeat,
    OfferRequest,
    ProfileRequest,
)
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.devnet.dev_platform import DevPlatform
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.read import read_batch
from cocoon.evidence import claims as binding
from cocoon.evidence.claims import Claims, TeeKind, evidence_id
from cocoon.evidence.open_tier import make_statement
from cocoon.evidence.policy import Policy, sign
from cocoon.evidence.provider import ProviderEvidence
from cocoon.evidence.trust import trust_document
from cocoon.kernel import ids
from cocoon.sealing import hpke
from cocoon.sealing.keys import EPOCH_MS, KeyBundle
from services.attestation.main import serve
from services.attestation.settings import AttestationSettings
from tests.support.servers import BERTHS, Bus, Database

NETWORK = "cocoon-test"
SIGNER = bytes(range(32))
MODEL_ID = hashlib.sha256(b"model").hexdigest()
OTHER_MODEL_ID = hashlib.sha256(b"another model").hexdigest()
HOUR_MS = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def offered(model_id: str = MODEL_ID, name: str = "skills-1") -> OfferedModel:
    return OfferedModel(
        model_id=model_id, name=name, context_tokens=4096, input_nanoton_per_mtok=10,
        cached_input_nanoton_per_mtok=1, output_nanoton_per_mtok=30,
    )  # fmt: skip


@dataclass
class Network:
    """A dev network's authority, files and the service that runs on them."""

    bus: Bus
    database: Database
    folder: Path
    authority: DevAuthority = field(default_factory=lambda: DevAuthority.create(now_ms()))
    ready: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        signer = bytes(SigningKey(SIGNER).verify_key)
        trust = dev_trust(self.authority, NETWORK, signer, bytes(32))
        (self.folder / "trust.json").write_bytes(trust_document(trust))
        (self.folder / "dsn").write_text(self.database.dsn("cocoon_attestation"))
        self.write_policy()

    def write_policy(self, **changes: Any) -> Policy:
        policy = dev_policy(self.authority, NETWORK, **changes)
        (self.folder / "policy.json").write_bytes(sign(policy, [SIGNER]).to_canonical())
        return policy

    def settings(self, **changes: Any) -> AttestationSettings:
        fields: dict[str, Any] = {
            "nats_url": self.bus.server.url,
            "nats_seed_file": self.bus.seed_file("attestation"),
            "entry_seed_file": self.bus.seed_file("entry"),
            "issuer_seed_file": self.bus.issuer_file,
            "berths": BERTHS,
            "postgres_dsn_file": self.folder / "dsn",
            "trust_file": self.folder / "trust.json",
            "policy_file": self.folder / "policy.json",
            "environment": "dev",
            "sweep_s": 0.05,
        }
        return AttestationSettings(**{**fields, **changes})

    @contextlib.asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[Stop]:
        """The service, from its ready line to its clean end."""
        stop = Stop()
        task = asyncio.create_task(serve(self.settings(**changes), stop))
        operator = await self.bus.connect("operator")
        try:
            await self._until_ready(task, operator)
            yield stop
        finally:
            stop()
            await task

    async def _until_ready(self, task: asyncio.Task[None], operator: Client) -> None:
        for _ in range(400):
            if task.done():
                task.result()
                raise AssertionError("the service ended before it was ready")
            with contextlib.suppress(Exception):
                await ask(operator, subjects.attestation("platform", "policy"), timeout_s=1)
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the service is not ready")

    async def events(self) -> list[tuple[str, Any]]:
        """(type, data) of everything in shard 0."""
        conn = await connect_log(self.database.admin_dsn, "test")
        try:
            found = await read_batch(conn, 0, 1, 1000)
        finally:
            await conn.close()
        return [(event.type, event.decode()) for event in found]

    async def types(self) -> list[str]:
        return [kind for kind, _ in await self.events()]

    async def platform_ask(self, verb: str, body: Any = None) -> dict[str, Any]:
        client = await self.bus.connect("operator")
        answer = await ask(client, subjects.attestation("platform", verb), body)
        found: dict[str, Any] = json.loads(answer)
        return found


@dataclass
class Provider:
    """A provider's agent, as far as attestation sees it."""

    network: Network
    client: Client
    provider_id: str
    identity_key: str
    platform: DevPlatform
    signing: SigningKey = field(default_factory=SigningKey.generate)
    epoch: int = 0
    evidence: ProviderEvidence | None = None

    @classmethod
    async def connect(
        cls, network: Network, index: int = 0, platform: DevPlatform | None = None
    ) -> Self:
        provider_id = network.bus.providers[index]
        seed = keys.read_seed_file(network.bus.seed_file(provider_id))
        return cls(
            network,
            await network.bus.connect(provider_id),
            provider_id,
            keys.raw_public(seed).hex(),
            platform or network.authority.platform(now_ms()),
        )

    async def ask(self, verb: str, body: Any = None) -> dict[str, Any]:
        answer = await ask(self.client, subjects.attestation(self.provider_id, verb), body)
        found: dict[str, Any] = json.loads(answer)
        return found

    async def enrol(self) -> dict[str, Any]:
        assert ids.provider_id(bytes.fromhex(self.identity_key)) == self.provider_id
        return await self.ask("enrol", EnrolRequest(identity_key=self.identity_key))

    async def challenge(self) -> Challenge:
        return Challenge(**await self.ask("challenge"))

    def make_evidence(
        self, challenge: Challenge, *, collateral: str | None = None, models: tuple[str, ...] = (),
        claims: dict[str, Any] | None = None, **changes: Any,
    ) -> ProviderEvidence:  # fmt: skip
        models = models or (MODEL_ID,)
        start_ms = now_ms()
        made = Claims(
            tee=TeeKind.TDX,
            x25519_public=hpke.public_key(bytes([7] * 32)),
            ed25519_public=bytes(self.signing.verify_key),
            key_epoch=self.epoch,
            not_before_ms=start_ms,
            not_after_ms=start_ms + HOUR_MS,
            models_root=binding.models_root(bytes.fromhex(item) for item in models),
            config_hash=bytes(32),
            gpu_evidence_hash=binding.NO_GPU,
            challenge=bytes.fromhex(challenge.challenge),
        )
        encoded = replace(made, **(claims or {})).encode()
        fields: dict[str, Any] = {
            "tee": "tdx",
            "provider_id": self.provider_id,
            "quote": self.platform.quote(binding.report_data(encoded)),
            "collateral": collateral or self.network.authority.collateral(start_ms - 60_000),
            "claims": encoded,
            "models": models,
            "checkpoint_root": challenge.checkpoint_root,
            "challenge_random": challenge.challenge_random,
        }
        return ProviderEvidence(**{**fields, **changes})

    async def attest(self, **changes: Any) -> dict[str, Any]:
        self.evidence = self.make_evidence(await self.challenge(), **changes)
        return await self.ask("submit_evidence", self.evidence)

    def make_bundle(self, evidence: bytes | None = None, signing: SigningKey | None = None) -> str:
        assert self.evidence is not None
        self.epoch += 1
        secret = hashlib.sha256(bytes([self.epoch]) + bytes(self.signing)).digest()
        start_ms = now_ms()
        bundle = KeyBundle(
            hpke.public_key(secret), self.epoch, start_ms, start_ms + EPOCH_MS,
            evidence or evidence_id(TeeKind.TDX, self.evidence.quote),
        )  # fmt: skip
        return bundle.sign(signing or self.signing).hex()

    async def publish_bundle(self, bundle: str | None = None) -> dict[str, Any]:
        return await self.ask("publish_bundle", BundleRequest(bundle=bundle or self.make_bundle()))

    async def publish_offer(self, *models: OfferedModel) -> dict[str, Any]:
        return await self.ask(
            "publish_offer", OfferRequest(models=models or (offered(),), concurrency=4)
        )

    async def publish_profile(self, region: str = "eu-west") -> dict[str, Any]:
        models = (ProfiledModel(model_id=MODEL_ID, quantisation="int8"),)
        return await self.ask("publish_profile", ProfileRequest(region=region, models=models))

    async def beat(self, **changes: Any) -> None:
        beat = Heartbeat(**{
            "provider_id": self.provider_id, "boot_id": "ab" * 16, "sequence": 1,
            "running": (("cd" * 16, 1),), "concurrency": 4, **changes,
        })  # fmt: skip
        await self.client.publish(subjects.heartbeat(self.provider_id), beat.to_canonical())
        await self.client.flush()

    async def admitted(self) -> Self:
        """Enrolled, attested, with an offer, a bundle and a heartbeat."""
        await self.enrol()
        await self.attest()
        await self.publish_offer()
        await self.publish_bundle()
        await self.beat()
        return self


@dataclass
class OpenProvider(Provider):
    """A provider without a TEE: its identity key signs its claims."""

    @property
    def identity(self) -> SigningKey:
        seed_file = self.network.bus.seed_file(self.provider_id)
        return SigningKey(keys.raw_seed(keys.read_seed_file(seed_file)))

    async def enrol(self, tier: Literal["open"] | None = "open") -> dict[str, Any]:
        return await self.ask("enrol", EnrolRequest(identity_key=self.identity_key, tier=tier))

    def make_evidence(
        self, challenge: Challenge, *, collateral: str | None = None, models: tuple[str, ...] = (),
        claims: dict[str, Any] | None = None, **changes: Any,
    ) -> ProviderEvidence:  # fmt: skip
        made = super().make_evidence(
            challenge, models=models, claims={"tee": TeeKind.NONE, **(claims or {})}
        )
        statement = make_statement(self.identity, binding.report_data(made.claims))
        mine: dict[str, Any] = {"tee": "none", "quote": statement, "collateral": collateral}
        return made.model_copy(update={**mine, **changes})

    def make_bundle(self, evidence: bytes | None = None, signing: SigningKey | None = None) -> str:
        assert self.evidence is not None
        return super().make_bundle(
            evidence or evidence_id(TeeKind.NONE, self.evidence.quote), signing
        )
