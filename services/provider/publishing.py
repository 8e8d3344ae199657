"""Manifests that the network asked for when it took the offer: sent after it, and never in its way.

A manifest that is not taken costs no job: the model is served without one on the network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from cocoon.contracts.base import Contract
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError, Fatal, Rejected, TooLarge
from cocoon.models.manifest import MAX_PUBLISHED_BYTES
from cocoon.telemetry.logs import get_logger
from services.provider.table import ModelTable

_log = get_logger("cocoon.provider.publishing")
RETRY_S: Final = 30.0

Ask = Callable[[str, Contract], Awaitable[dict[str, Any]]]  # verb, body


class ManifestPublisher:
    """What is wanted and not sent yet. After a refusal for good nothing is sent until asked again,
    with the next offer."""

    def __init__(self, models: ModelTable, ask: Ask, clock: Clock) -> None:
        self._models, self._ask, self._clock = models, ask, clock
        self._wanted: list[str] = []
        self._not_before_s = float("-inf")

    def heard(self, answer: dict[str, Any]) -> None:
        """The answer to an offer: which manifests the network lacks, if it says so."""
        wanted = answer.get("manifests_wanted")
        ids = wanted if isinstance(wanted, list) else []
        self._wanted = [m.model_id for m in self._models.all if m.model_id in ids]
        self._not_before_s = float("-inf")

    async def publish(self) -> None:
        """Send what is due. Raises Fatal alone; an error that may pass is tried again later."""
        if not self._wanted or self._clock.monotonic_s() < self._not_before_s:
            return
        for model_id in tuple(self._wanted):
            try:
                await self._send(model_id)
            except Fatal:
                raise
            except CocoonError as error:
                _log.warning("manifest_not_published", model_id=model_id, code=error.code)
                if not isinstance(error, Rejected):
                    pause_s = max(RETRY_S, error.retry_after_s or 0)
                    self._not_before_s = self._clock.monotonic_s() + pause_s
                    return
            self._wanted.remove(model_id)

    async def _send(self, model_id: str) -> None:
        model = self._models.of(model_id)
        if model is None:
            return
        size = len(model.manifest.to_canonical())
        if size > MAX_PUBLISHED_BYTES:
            raise TooLarge(
                f"the manifest of {model.config.name} is larger than the network keeps "
                f"({MAX_PUBLISHED_BYTES // 1024} KiB)",
                code="manifest_too_large",
            )
        await self._ask("publish_manifest", model.manifest)
        _log.info("manifest_published", model_id=model_id, size_bytes=size)
