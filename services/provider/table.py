"""The table of the models that this agent serves, and what the network is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from cocoon.contracts.events import OfferedModel
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import Unavailable
from cocoon.telemetry.logs import get_logger
from services.provider.models import ServedModel

_log = get_logger("cocoon.provider.table")
MAX_PLACES: Final = 65_536


class ModelTable:
    """Who is served now, and what the network is told of it."""

    def __init__(self, models: Iterable[ServedModel], clock: Clock, *, grace_s: float) -> None:
        self._models = tuple(models)  # the wanted ones first
        self._clock = clock
        self._grace_s = grace_s
        self._ids = frozenset(model.id_bytes for model in self._models)

    @property
    def all(self) -> tuple[ServedModel, ...]:
        """Also those that only finish their jobs."""
        return self._models

    @property
    def wanted(self) -> tuple[ServedModel, ...]:
        return tuple(model for model in self._models if model.wanted)

    def of(self, model_id: str) -> ServedModel | None:
        return next((model for model in self._models if model.model_id == model_id), None)

    def ids(self) -> frozenset[bytes]:
        """What requests may be sealed for."""
        return self._ids

    def replace(self, wanted: Iterable[ServedModel]) -> None:
        """Offer these from now on; the others finish what they have."""
        fresh = tuple(wanted)
        left = tuple(model for model in self._models if model not in fresh)
        for model in left:
            model.wanted = False
        self._models = fresh + left
        self._ids = frozenset(model.id_bytes for model in self._models)

    # ---- what the network is told ----

    @property
    def taking_jobs(self) -> bool:
        return any(model.takes_jobs for model in self._models if model.wanted)

    def places(self) -> int:
        """Of the offer: all that would be taken at once."""
        return min(MAX_PLACES, sum(model.config.places for model in self.wanted))

    def room(self) -> int:
        """Of a heartbeat: what others have of the engines, and engines that are away, is less."""
        return max(1, min(MAX_PLACES, sum(model.room for model in self.wanted)))

    def full(self) -> tuple[str, ...]:
        """Models without a place while others may have one."""
        several = len(self.wanted) > 1
        return tuple(m.model_id for m in self.wanted if several and m.takes_jobs and m.is_full)

    def away(self) -> tuple[str, ...]:
        return tuple(model.model_id for model in self.wanted if not model.takes_jobs)

    def offer(self) -> tuple[OfferedModel, ...]:
        return tuple(model.offered for model in self.wanted)

    def published(self, offer: Iterable[OfferedModel]) -> None:
        """The network has this offer now: what it does not name ends after the grace time."""
        now_s = self._clock.monotonic_s()
        known = {model.model_id: model for model in offer}
        for model in self._models:
            one = known.get(model.model_id)
            if one is not None:
                prices = (
                    one.input_nanoton_per_mtok,
                    one.cached_input_nanoton_per_mtok,
                    one.output_nanoton_per_mtok,
                )
                model.prices.published(prices, now_s + self._grace_s)
            offered = self.of(model.model_id)
            named = one is not None and not (offered and offered.wanted)  # not by another engine
            if not model.wanted and model.told_s is None and not named:
                model.told_s = now_s

    # ---- its life ----

    async def keep(self) -> None:
        """Look after every engine once."""
        models = self._models
        over = await asyncio.gather(*(model.keep(self._grace_s) for model in models))
        gone = [m for m, forget in zip(models, over, strict=True) if forget and not m.wanted]
        if gone:
            self._models = tuple(model for model in self._models if model not in gone)
            self._ids = frozenset(model.id_bytes for model in self._models)
        for model in gone:
            await model.engine.close()

    async def close(self) -> None:
        await asyncio.gather(*(model.engine.close() for model in self._models))


async def start_all(models: Iterable[ServedModel]) -> None:
    """Start the warm ones. One that is not there yet is away, unless no other could serve.

    Raises ConfigurationError, or Unavailable if none can serve.
    """
    served = tuple(models)
    warm = [model for model in served if model.config.warm]
    ends = await asyncio.gather(*(m.engine.start() for m in warm), return_exceptions=True)
    errors = [end for end in ends if end is not None]
    for error in errors:
        if not isinstance(error, Unavailable) or len(errors) == len(served):
            raise error
    for model, end in zip(warm, ends, strict=True):
        if isinstance(end, Unavailable):
            _log.warning("engine_not_started", model_id=model.model_id, code=end.code)
            model.health = model.health.not_started()
