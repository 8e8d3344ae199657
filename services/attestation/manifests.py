"""What a model id names, for whoever asks: the manifests that providers publish, by their hash.

They are not events: bytes that prove themselves need no order, and no decision reads them.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Final

from cocoon.contracts.messages import ManifestRequest
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import BadRequest, Forbidden, NotFound, RateLimited, TooLarge
from cocoon.kernel.pace import Buckets
from cocoon.models.manifest import MAX_PUBLISHED_BYTES, parse_published
from cocoon.telemetry.logs import get_logger
from services.attestation import store
from services.attestation.memory import Memory
from services.attestation.settings import AttestationSettings
from services.attestation.shelf import Kept, Limits

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("services.attestation.manifests")
DAY_MS: Final = 86_400_000
PUBLISHED_PER_S, PUBLISHED_AT_ONCE, PUBLISHERS = 0.2, 64, 16_384  # by one provider; counted ones


class Manifests:
    """The table and its index in memory. One publication is written at a time."""

    def __init__(
        self, settings: AttestationSettings, pool: Pool, memory: Memory, clock: Clock
    ) -> None:
        self._pool, self._memory, self._clock = pool, memory, clock
        self._kept_ms = settings.manifests_kept_days * DAY_MS
        self._limits = Limits(
            settings.manifests, settings.manifests_per_provider, settings.manifests_bytes
        )
        self._pace = Buckets(PUBLISHED_PER_S, PUBLISHED_AT_ONCE, PUBLISHERS)
        self._writing = asyncio.Lock()

    async def load(self) -> None:
        """Read what is kept, without the documents."""
        self._memory.shelf.load(await store.load_manifests(self._pool))

    def lacking(self, provider_id: str) -> list[str]:
        """The model ids that this provider offers under its evidence and nobody has published."""
        state = self._memory.providers.get(provider_id)
        evidence = self._memory.evidence_of(provider_id)
        if state is None or state.offer is None or evidence is None:
            return []
        offered = {model.model_id for model in state.offer.models}
        return self._memory.shelf.lacking(offered & set(evidence.models))

    async def publish(self, provider_id: str, body: bytes) -> dict[str, object]:
        """Keep a manifest of a model that the provider's evidence names. Raises the tree's errors.

        The cheap checks come first: anybody who enrolled can send 256 KiB of anything.
        """
        if not self._pace.take(provider_id, self._clock.monotonic_s()):
            raise RateLimited(
                "this provider publishes manifests too often; wait some seconds",
                code="too_many_requests",
                retry_after_s=5,
            )
        if len(body) > MAX_PUBLISHED_BYTES:
            raise TooLarge(
                f"a published manifest is at most {MAX_PUBLISHED_BYTES // 1024} KiB; this model is "
                "served without one on the network",
                code="manifest_too_large",
            )
        model_id = hashlib.sha256(body).hexdigest()
        evidence = self._memory.evidence_of(provider_id)
        if evidence is None or model_id not in evidence.models:
            raise Forbidden(
                "these bytes are the manifest of no model that this provider's evidence names; "
                "attest with the model's id, and send the manifest as `model add` wrote it",
                code="manifest_mismatch",
            )
        if model_id in self._memory.shelf:
            return {"model_id": model_id, "new": False}
        try:
            manifest = parse_published(body, model_id)
        except ValueError:  # whoever makes an id of other bytes can have it attested
            raise BadRequest(
                "this is not a model's manifest in its canonical form; `model add` makes one",
                code="manifest_malformed",
            ) from None
        async with self._writing:
            if model_id in self._memory.shelf:
                return {"model_id": model_id, "new": False}
            now_ms = self._clock.now_ms()
            kept = Kept(len(body), manifest.kind, manifest.quantisation, provider_id, now_ms)
            gone = self._memory.shelf.make_room(
                provider_id, len(body), self._limits, self._memory.offered_ids
            )
            await store.save_manifest(self._pool, model_id, body, kept, gone)
            self._memory.shelf.drop(gone)
            self._memory.shelf.put(model_id, kept)
        log.info("manifest_published", provider_id=provider_id, model_id=model_id)
        return {"model_id": model_id, "new": True}

    async def do_manifest(self, _who: str, body: bytes, _tp: str) -> bytes:
        """The manifest's own bytes. Raises NotFound."""
        model_id = ManifestRequest.model_validate_json(body).model_id
        document = None
        if model_id in self._memory.shelf:  # a stranger's guess costs no query
            document = await store.load_manifest(self._pool, model_id)
        if document is None:
            raise NotFound(
                "nobody has published the manifest of this model id here; a provider does when it "
                "offers the model",
                code="manifest_not_found",
            )
        return document

    async def keep_house(self, now_ms: int) -> None:
        """Note what is offered now, and forget what has long not been."""
        async with self._writing:
            offered = self._memory.offered_ids()
            await store.touch_manifests(self._pool, offered, now_ms)
            self._memory.shelf.offered(offered, now_ms)
            stale = self._memory.shelf.stale(now_ms - self._kept_ms, offered)
            if stale:
                await store.forget_manifests(self._pool, stale)
                self._memory.shelf.drop(stale)
                log.info("manifests_forgotten", count=len(stale))
