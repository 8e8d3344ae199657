"""The agent's word to the network: enrol, prove, offer, announce each key before it is needed.

Evidence is renewed hourly and well before it runs out; each renewal brings a new key, so a key
belongs to one piece of evidence for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.base import Contract
from cocoon.contracts.events import ProfiledModel
from cocoon.contracts.messages import (
    BundleRequest,
    Challenge,
    EnrolRequest,
    OfferRequest,
    ProfileRequest,
)
from cocoon.evidence import claims as binding
from cocoon.evidence.claims import NO_GPU, Claims, TeeKind
from cocoon.evidence.provider import ProviderEvidence
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError, ConfigurationError, Fatal, Forbidden, Rejected
from cocoon.sealing import KeyBundle
from cocoon.telemetry.logs import get_logger
from services.provider.enclave import Enclave
from services.provider.entering import IN_LOBBY, enter
from services.provider.epochs import Epoch
from services.provider.publishing import ManifestPublisher
from services.provider.standing import Standing
from services.provider.table import ModelTable
from services.provider.tee import QuoteSource

if TYPE_CHECKING:
    from cocoon.bus.client import BusClient

_log = get_logger("cocoon.provider.announcing")
FIRST_BACKOFF_S: Final = 0.25
LONGEST_BACKOFF_S: Final = 30.0
REQUEST_TIMEOUT_S: Final = 15.0
CLAIMS_BACKDATE_MS: Final = 1000  # for clocks that differ a little
NOT_ATTESTED: Final = ("not_attested", "stale_evidence")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is, and where it says that it stands."""

    provider_id: str
    identity_key: bytes
    region: str = ""


def _config_hash(offer: OfferRequest) -> bytes:
    """What the claims bind of the configuration: the offer as it was when they were made."""
    return hashlib.sha256(b"cai/1 config\0" + offer.to_canonical()).digest()


def enrolment(identity_key: bytes, tee: QuoteSource) -> EnrolRequest:
    """What this agent enrols as: without a TEE in the open tier."""
    tier: Literal["open"] | None = "open" if tee.kind is TeeKind.NONE else None
    return EnrolRequest(identity_key=identity_key.hex(), tier=tier)


class Announcer:
    """Keeps the network's picture of this agent current. `ready` while a key is announced.

    A change of the table's offer is published at the next tick, or at once after `changed`; a
    model that the evidence does not name yet is proved first.
    """

    def __init__(
        self, nc: BusClient, identity: Identity, models: ModelTable, enclave: Enclave,
        tee: QuoteSource, clock: Clock, *, evidence_ms: int, renew_ms: int, tick_s: float,
    ) -> None:  # fmt: skip
        self._nc = nc
        self._identity = identity
        self._models = models
        self._enclave = enclave
        self._tee = tee
        self._clock = clock
        self._evidence_ms = evidence_ms
        self._renew_ms = renew_ms
        self._tick_s = tick_s
        self._evidence_id: bytes | None = None
        self._renew_at_ms = 0
        self._valid_until_ms = 0
        self._current: Epoch | None = None
        self._proved: frozenset[str] = frozenset()  # the models that the evidence names
        self._published: OfferRequest | None = None
        self._profiled: ProfileRequest | None = None
        self._publisher = ManifestPublisher(models, self._ask, clock)
        self._changed = asyncio.Event()
        self.standing = Standing()

    def changed(self) -> None:
        """The table's offer may be another: look at once."""
        self._changed.set()

    def prove_again(self) -> None:
        """The network took its word back for something that new evidence may cure: try at once."""
        self.standing.barred = False
        self._renew_at_ms = 0
        self.changed()

    def ready(self) -> bool:
        """Whether the network may send jobs here now."""
        now_ms = self._clock.now_ms()
        current = self._current
        return (
            current is not None and now_ms < current.not_after_ms and now_ms < self._valid_until_ms
            and not self.standing.revoked
        )  # fmt: skip

    async def start(self) -> None:
        """Enrol, attest, offer and announce the first key. Raises the tree's errors."""
        enrolled = await self._ask("enrol", enrolment(self._identity.identity_key, self._tee))
        self.standing.tier = str(enrolled.get("tier", ""))
        await self._attest()

    async def run(self) -> None:
        """Renew evidence and keys in time, until cancelled. Errors are tried again, more slowly."""
        pause_s = self._tick_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self.tick()
                pause_s = self._tick_s
            except Fatal:
                raise
            except CocoonError as error:
                pause_s = min(max(pause_s * 2, FIRST_BACKOFF_S), LONGEST_BACKOFF_S)
                _log.warning("announce_failed", code=error.code, delay_s=pause_s)

    async def tick(self) -> None:
        """Do what is due: new evidence, another offer, a new key under the current evidence."""
        now_ms = self._clock.now_ms()
        epochs = self._enclave.epochs
        epochs.prune(now_ms)
        if self.standing.barred:
            return  # whatever is announced is refused; the watch tells when that ends
        if now_ms >= self._renew_at_ms or not self._wanted_ids() <= self._proved:
            await self._attest()
            return
        await self._publish()
        if (
            self._current is None
            or not epochs.holds(self._current)  # erased by a clock that jumped, or killed
            or now_ms >= epochs.next_due_ms(self._current)
        ):
            epoch = await epochs.make(now_ms)
            try:
                await self._announce(epoch)
            except BaseException:
                epochs.drop(epoch)
                raise
        await self._publisher.publish()

    async def _attest(self) -> None:
        epochs = self._enclave.epochs
        epoch = await epochs.make(self._clock.now_ms())
        try:
            proved, answer = await self._prove(epoch)
            valid_until_ms = int(answer["valid_until_ms"])
            self._evidence_id = bytes.fromhex(answer["evidence_id"])
            now_ms = self._clock.now_ms()
            # the network's own limits (collateral, policy) may end the evidence earlier
            left_ms = valid_until_ms - now_ms
            self._renew_at_ms = now_ms + min(self._renew_ms, left_ms // 2)
            self._valid_until_ms = valid_until_ms
            self._proved = proved
            self.standing.attested(valid_until_ms, str(answer.get("assurance", "")))
            await self._announce(epoch)
            if self._wanted_ids() <= proved:
                self._published = None  # what stands is said again with each piece of evidence
                await self._publish()
            else:
                self._changed.set()  # a model came meanwhile: it is proved before it is offered
        except BaseException:
            self._renew_at_ms = 0  # what was announced may be half of it: try again soon
            if epoch is not self._current:
                epochs.drop(epoch)
            raise

    def _offer(self) -> OfferRequest:
        return OfferRequest(models=self._models.offer(), concurrency=self._models.places())

    def _wanted_ids(self) -> frozenset[str]:
        return frozenset(model.model_id for model in self._models.wanted)

    async def _publish(self) -> None:
        """Tell the offer and the profile, where the network has others or may not have them."""
        offer = self._offer()
        if offer != self._published:
            self._publisher.heard(await self._ask("publish_offer", offer))
            self._published = offer
            self._models.published(offer.models)
            _log.info("offer_published", count=len(offer.models))
        profile = self._profile()
        if profile != self._profiled:
            await self._ask("publish_profile", profile)
            self._profiled = profile

    def _profile(self) -> ProfileRequest:
        quantised = {m.model_id: m.manifest.quantisation for m in self._models.wanted}
        models = tuple(
            ProfiledModel(model_id=model_id, quantisation=quantisation)
            for model_id, quantisation in quantised.items()
        )
        return ProfileRequest(region=self._identity.region, models=models)

    async def _prove(self, epoch: Epoch) -> tuple[frozenset[str], dict[str, Any]]:
        """Prove every model that jobs may run on here. Returns their ids and the answer.

        One that only finishes may be why the evidence is refused: then the others go without it.
        """
        ids = list(dict.fromkeys(model.model_id for model in self._models.all))
        wanted = self._wanted_ids()
        try:
            return frozenset(ids), await self._submit_evidence(epoch, ids)
        except Rejected:
            if wanted.issuperset(ids):
                raise
        left = [item for item in ids if item in wanted]
        return frozenset(left), await self._submit_evidence(epoch, left)

    async def _submit_evidence(self, epoch: Epoch, model_ids: list[str]) -> dict[str, Any]:
        raw = await self._ask("challenge", None)
        challenge = Challenge.model_validate(raw)
        begins_ms = self._clock.now_ms() - CLAIMS_BACKDATE_MS
        quoted_kind = self._tee.kind
        claims = Claims(
            tee=quoted_kind,
            x25519_public=epoch.public_key,
            ed25519_public=self._enclave.signing_public,
            key_epoch=epoch.number,
            not_before_ms=begins_ms,
            not_after_ms=begins_ms + self._evidence_ms,
            models_root=binding.models_root(bytes.fromhex(item) for item in model_ids),
            config_hash=_config_hash(self._offer()),
            gpu_evidence_hash=NO_GPU,
            challenge=bytes.fromhex(challenge.challenge),
        ).encode()
        quoted = await self._tee.quote(binding.report_data(claims))
        if quoted.kind is not quoted_kind:
            raise ConfigurationError("the machine gave another kind of quote than it has")
        evidence = ProviderEvidence(
            tee="none" if quoted_kind is TeeKind.NONE else "tdx",
            provider_id=self._identity.provider_id,
            quote=quoted.quote,
            collateral=quoted.collateral,
            claims=claims,
            models=tuple(model_ids),
            checkpoint_root=challenge.checkpoint_root,
            challenge_random=challenge.challenge_random,
        )
        answer = await self._ask("submit_evidence", evidence)
        own = binding.evidence_id(quoted.kind, quoted.quote).hex()
        if answer.get("evidence_id") != own:
            raise ConfigurationError("attestation names other evidence than was sent")
        return answer

    async def _announce(self, epoch: Epoch) -> None:
        """Publish a key's bundle; it is current only once the network has it."""
        evidence_id = self._evidence_id
        if evidence_id is None:
            raise ConfigurationError("there is no evidence to announce a key under")
        bundle = KeyBundle(
            x25519_pk=epoch.public_key, epoch=epoch.number, not_before_ms=epoch.not_before_ms,
            not_after_ms=epoch.not_after_ms, evidence_id=evidence_id,
        )  # fmt: skip
        epoch.evidence_id = evidence_id  # requests may come before our request's answer does
        signed = bundle.sign(self._enclave.signing_key)
        await self._ask("publish_bundle", BundleRequest(bundle=signed.hex()))
        self._current = epoch
        _log.info("key_announced", key_id=epoch.key_id.hex(), epoch=epoch.number)

    async def _ask(self, verb: str, body: Contract | None) -> dict[str, Any]:
        subject = subjects.attestation(self._identity.provider_id, verb)
        try:
            try:
                text = await ask(self._nc, subject, body, REQUEST_TIMEOUT_S)
            except Forbidden as error:  # its place went to another while it was away
                if error.code != IN_LOBBY:
                    raise
                who = self._identity
                await enter(self._nc, who.provider_id, enrolment(who.identity_key, self._tee))
                text = await ask(self._nc, subject, body, REQUEST_TIMEOUT_S)
        except Rejected as error:
            now_ms = self._clock.now_ms()
            self.standing.refused(error, now_ms)
            if error.code in NOT_ATTESTED:  # revoked behind our back: prove it all again
                self._renew_at_ms = 0
            raise
        try:
            answer = json.loads(text) if text else {}
            if not isinstance(answer, dict):
                raise TypeError
        except (ValueError, TypeError):
            raise ConfigurationError("attestation answered what is not a JSON object") from None
        return answer
