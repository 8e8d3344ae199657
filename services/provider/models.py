"""One model that this agent serves: its prices, places, health and engine.

A model that left the file stays until its last job has ended.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Final

from cocoon.agent.config import ModelConfig
from cocoon.contracts.events import OfferedModel
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError
from cocoon.models import ModelManifest
from cocoon.sealing import Status
from cocoon.telemetry.logs import get_logger
from services.provider.backends.base import Backend, Embedder, EngineLoad
from services.provider.planning import Facts, Health, Plan, plan
from services.provider.prices import PriceBook
from services.provider.queueing import Engine
from services.provider.tallying import Tally

_log = get_logger("cocoon.provider.models")
HEALTH_TIMEOUT_S: Final = 30.0
START_LOOK_S: Final = 1.0  # a start takes minutes, and the other engines are looked after meanwhile


class ServedModel:
    """One model. Its jobs keep it, whatever becomes of its configuration."""

    def __init__(
        self, config: ModelConfig, model_id: str, engine: Engine, clock: Clock,
        load: EngineLoad | None = None, *, manifest: ModelManifest,
    ) -> None:  # fmt: skip
        self.config = config
        self.engine = engine
        self.load = load or EngineLoad()  # what others have of the engine is not offered
        self.model_id = model_id
        self.id_bytes = bytes.fromhex(model_id)
        self.names = (config.name, self.model_id)
        self.manifest = manifest
        self.request_tokens = engine.backend.request_tokens
        self.prices = PriceBook(config.price.all)
        self.tally = Tally(clock)
        self.health = Health()
        self.wanted = True
        self.told_s: float | None = None
        self._clock = clock
        self._jobs = 0
        self._idle_since_s = clock.monotonic_s()
        self._takes = True

    # ---- its jobs ----

    @property
    def backend(self) -> Backend | Embedder:
        return self.engine.backend

    def place(self) -> AbstractAsyncContextManager[None]:
        return self.engine.place()

    @property
    def takes_jobs(self) -> bool:
        """Whether a job may come now, room or not."""
        return self._takes and not self.health.away

    @property
    def jobs(self) -> int:
        """Accepted or being opened, and not ended."""
        return self._jobs

    @property
    def is_full(self) -> bool:
        return self._jobs >= self.config.places

    def join(self) -> None:
        """A job is there. Pair it with `leave`."""
        self._jobs += 1

    def leave(self) -> None:
        self._jobs -= 1
        self._idle_since_s = self._clock.monotonic_s()

    def count(self, status: Status, counts: tuple[int, int, int, int]) -> None:
        """A job ended in a receipt: input, cached input, output and reasoning tokens."""
        self.tally.count(counts[0], counts[2])
        if status in (Status.COMPLETE, Status.LENGTH):
            self.health = self.health.answered(well=True)
        elif status is Status.FAILED:
            self.health = self.health.answered(well=False)

    # ---- what it is ----

    @property
    def offered(self) -> OfferedModel:
        prices = self.config.price
        return OfferedModel(
            model_id=self.model_id, name=self.config.name, context_tokens=self.request_tokens,
            input_nanoton_per_mtok=prices.input,
            cached_input_nanoton_per_mtok=prices.cached_input,
            output_nanoton_per_mtok=prices.output,
        )  # fmt: skip

    @property
    def room(self) -> int:
        """Places that are its own jobs' now, used or not; none while it is away."""
        return 0 if not self.takes_jobs else max(0, self.config.places - self.load.elsewhere)

    def configure(self, config: ModelConfig) -> None:
        """Take over what needs no other engine."""
        self.config = config
        self.engine.concurrency = config.concurrency
        self.prices.change(config.price.all)
        self.wanted, self.told_s, self._takes = True, None, True

    def inherit(self, former: ServedModel) -> None:
        """Follow another entry of the same model: what was matched for that one is taken here."""
        self.prices, self.tally = former.prices, former.tally
        self.prices.change(self.config.price.all)

    # ---- its life ----

    def plan(self, now_s: float, grace_s: float) -> Plan:
        facts = Facts(
            wanted=self.wanted, told_s=self.told_s, warm=self.config.warm,
            unload_after_s=self.config.unload_after_s, up=self.engine.up, jobs=self._jobs,
            idle_since_s=self._idle_since_s, health=self.health,
        )  # fmt: skip
        return plan(facts, now_s, grace_s=grace_s)

    async def keep(self, grace_s: float) -> bool:
        """Check the engine, start or stop it as is due. Returns whether to forget the model."""
        was_away = self.health.away
        if self.plan(self._clock.monotonic_s(), grace_s).start:
            await self.start(START_LOOK_S)
        else:
            passed = await self._passes()
            self.health = self.health.checked(passed=passed)
        if self.health.away != was_away:
            _log.warning("engine_changed", model_id=self.model_id, ready=was_away)
        due = self.plan(self._clock.monotonic_s(), grace_s)
        self._takes = due.takes or self.health.away
        if due.stop:
            await self._unload()
        return due.forget

    async def start(self, wait_s: float | None = None) -> bool:
        """Start the engine; one that does not start is away, and is tried again.

        After `wait_s` it is away as well, and its start goes on.
        """
        try:
            async with asyncio.timeout(wait_s):
                await self.engine.start()
        except TimeoutError:
            self.health = self.health.not_started()
            return False
        except CocoonError as error:
            _log.warning("engine_not_started", model_id=self.model_id, code=error.code)
            self.health = self.health.not_started()
            return False
        self.health = Health()
        return True

    async def _unload(self) -> None:
        try:
            await self.engine.stop_if_idle()
        except CocoonError as error:
            _log.warning("engine_not_stopped", model_id=self.model_id, code=error.code)
            self.health = self.health.not_started()

    async def _passes(self) -> bool:
        if self.health.suspect:
            return await self.engine.probe()
        if not self.engine.up:
            return True  # it is not asked before it is needed
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                ready = await self.engine.backend.healthy()
        except TimeoutError:
            return False
        return ready and self.load.elsewhere < self.config.concurrency
