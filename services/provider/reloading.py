"""Take the file over again while jobs run: all of it, or nothing and a sentence that says why.

Models may come, go and change; what the other sections say holds until a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final

from cocoon.agent.config import AgentConfig, ModelConfig, read_config
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError, ConfigurationError, Conflict
from cocoon.telemetry.logs import get_logger
from services.provider.models import ServedModel
from services.provider.table import ModelTable

_log = get_logger("cocoon.provider.reloading")
# What an engine need not be made anew for
LIVE: Final = {"price", "concurrency", "max_waiting", "warm", "unload_after_s", "enabled"}
MAX_PROVED: Final = 256  # that evidence may name

Prepare = Callable[[ModelConfig], Awaitable[ServedModel | None]]


def same_engine(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether one engine serves both."""
    return one.model_dump(exclude=LIVE) == other.model_dump(exclude=LIVE)


class Reloader:
    """`config` is what is in force. One reload at a time."""

    def __init__(
        self, path: Path | None, config: AgentConfig, models: ModelTable, prepare: Prepare,
        allows: Callable[[str], bool], clock: Clock, on_change: Callable[[], None],
    ) -> None:  # fmt: skip
        self._path = path
        self._models = models
        self._prepare = prepare
        self._allows = allows
        self._clock = clock
        self._on_change = on_change
        self._task: asyncio.Task[tuple[int, dict[str, Any]]] | None = None
        self._once_more = False
        self.config = config
        self.last: dict[str, Any] | None = None
        self.closed = False  # the agent ends: nothing is taken over any more

    def ask(self) -> asyncio.Task[tuple[int, dict[str, Any]]]:
        """Begin a reload (a signal came); one that runs already looks at the file once more."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._reload())
        else:
            self._once_more = True
        return self._task

    async def wait(self, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """Reload and tell what came of it; 202 if it goes on (large weights are hashed)."""
        task = self.ask()
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            return 202, {
                "ok": None,
                "message": "the reload goes on; look at last_reload in /status",
            }
        return task.result()

    async def close(self) -> None:
        self.closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _reload(self) -> tuple[int, dict[str, Any]]:
        while True:
            self._once_more = False
            try:
                self._tell(ok=True, message=await self._take_over())
                code = 200
            except CocoonError as error:
                _log.warning("reload_refused", code=error.code, exc_info=error)
                self._tell(ok=False, message=error.message)
                code = 422
            except Exception as error:  # noqa: BLE001 - the old file stays in force, whatever broke
                _log.error("reload_broke", exc_info=error)
                self._tell(ok=False, message="nothing was taken over; the agent's log says why")
                code = 500
            if not self._once_more:
                return code, dict(self.last or {})

    def _tell(self, *, ok: bool, message: str) -> None:
        self.last = {"ok": ok, "message": message, "at_ms": self._clock.now_ms()}

    async def _take_over(self) -> str:
        if self._path is None:
            raise ConfigurationError(
                "this agent runs from variables, which do not change; give it a file with "
                "COCOON_PROVIDER_CONFIG_FILE"
            )
        fresh = await asyncio.to_thread(read_config, self._path)
        for section in ("network", "agent", "tee"):
            if getattr(fresh, section) != getattr(self.config, section):
                raise ConfigurationError(
                    f"[{section}] has changed, which needs a restart; undo it, or restart the agent"
                )
        wanted, made = await self._wanted(fresh.enabled)
        if self.closed:
            await _close(made)
            raise Conflict("the agent ends; start it again with the new file", code="draining")
        if any(model not in (*made, *self._models.all) for model, _ in wanted):
            await _close(made)  # one that was leaving has left meanwhile: it is made anew
            return await self._take_over()
        self._apply(wanted, made)
        self.config = fresh
        self._on_change()
        _log.info("reloaded", count=len(wanted))
        return f"{len(wanted)} models are offered, {len(made)} of them new"

    async def _wanted(
        self, configs: Iterable[ModelConfig]
    ) -> tuple[list[tuple[ServedModel, ModelConfig]], list[ServedModel]]:
        """The models that the file wants, in its order, and those of them that were made for it."""
        wanted: list[tuple[ServedModel, ModelConfig]] = []
        made: list[ServedModel] = []
        try:
            for config in configs:
                known = (m for m in self._models.all if same_engine(m.config, config))
                model = next(known, None)
                if model is None:
                    model = await self._prepare(config)
                    if model is None:
                        raise Conflict("the agent ends; nothing is taken over", code="draining")
                    made.append(model)
                    if not self._allows(model.model_id):
                        raise ConfigurationError(
                            f"the network's policy does not list the model {config.name} "
                            f"({model.model_id}); remove it, or have it listed"
                        )
                wanted.append((model, config))
            if len(self._models.all) + len(made) > MAX_PROVED:
                raise ConfigurationError(
                    "too many models still finish their jobs; reload again in some minutes"
                )
            await asyncio.gather(*(model.start() for model in made if model.config.warm))
        except BaseException:
            await _close(made)
            raise
        return wanted, made

    def _apply(
        self, wanted: list[tuple[ServedModel, ModelConfig]], made: list[ServedModel]
    ) -> None:
        """Without a pause between: no dispatch sees half of it."""
        for model, config in wanted:
            if model in made:
                former = self._models.of(model.model_id)
                if former is not None:
                    model.inherit(former)
            else:
                model.configure(config)
        self._models.replace(model for model, _ in wanted)


async def _close(models: Iterable[ServedModel]) -> None:
    await asyncio.gather(*(model.engine.close() for model in models))
