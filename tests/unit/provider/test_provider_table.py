"""Models that come, go and fall ill, and a file that is read again: what no reload may mix up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cocoon.agent import AgentConfig, ModelConfig, ModelPrice, write_config
from cocoon.agent.config import Agent, Network
from cocoon.chat import Capabilities, Embedded
from cocoon.kernel.errors import Unavailable
from cocoon.models.manifest import describe_server
from cocoon.sealing import Status
from services.provider.models import ServedModel
from services.provider.queueing import Engine
from services.provider.reloading import Reloader
from services.provider.table import ModelTable

GRACE_S = 60.0
PRICE = ModelPrice(input=1, cached_input=1, output=1)


class Clock:
    """Monotonic seconds as the test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def now_ms(self) -> int:
        return int(self.now_s * 1000)


class Embeds:
    """An engine that says it is well, and starts and answers as the test says."""

    kind = "embeddings"
    capabilities = Capabilities()
    system_fingerprint = "fp_0"
    context_tokens = request_tokens = 64
    dimensions = 1

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.breaks = self.closed = False

    async def start(self) -> None:
        await self.ready.wait()

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None:
        self.closed = True

    async def embed(self, _request: Any, *, max_input_tokens: int) -> Embedded:
        raise Unavailable("it has no memory left")


def config(name: str, **fields: Any) -> ModelConfig:
    return ModelConfig(**{"name": name, "price": PRICE, **fields})


def served(of: ModelConfig, clock: Clock) -> ServedModel:
    model_id = of.name.encode().hex().ljust(64, "0")
    manifest = describe_server(of.name, {"model": of.name})
    engine = Engine(Embeds, of.concurrency)
    return ServedModel(of, model_id, engine, clock, manifest=manifest)


class World:
    """A table and the file that it comes from."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.path = folder / "provider.toml"
        self.clock = Clock()
        self.made: list[str] = []
        models = [config(name) for name in names]
        self.table = ModelTable(
            [served(one, self.clock) for one in models], self.clock, grace_s=GRACE_S
        )
        self.reloader = Reloader(
            self.path, self.write(*models), self.table, self.prepare, lambda _: True, self.clock,
            lambda: None,
        )  # fmt: skip

    def write(self, *models: ModelConfig) -> AgentConfig:
        folder = self.path.parent
        whole = AgentConfig(
            network=Network(bus=("nats://127.0.0.1:1",), trust_file=folder / "trust.json"),
            agent=Agent(seed_file=folder / "seed", data_dir=folder), models=models,
        )  # fmt: skip
        write_config(whole, self.path)
        return whole

    async def prepare(self, of: ModelConfig) -> ServedModel | None:
        self.made.append(of.name)
        return served(of, self.clock)

    async def reload(self, *models: ModelConfig) -> tuple[int, dict[str, Any]]:
        self.write(*models)
        return await self.reloader.wait(20)

    def of(self, name: str) -> ServedModel:
        return next(one for one in self.table.all if one.config.name == name)


async def test_a_model_that_leaves_while_the_file_takes_it_back_is_made_anew(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, "one", "two")
    assert (await world.reload(config("one")))[0] == 200
    world.table.published(world.table.offer())
    world.clock.now_s += GRACE_S

    async def slowly(of: ModelConfig) -> ServedModel | None:
        if of.name == "large":
            await world.table.keep()  # two's time is over while large is hashed
        return await world.prepare(of)

    world.reloader._prepare = slowly
    assert (await world.reload(*map(config, ("one", "two", "large"))))[0] == 200
    assert [one.config.name for one in world.table.wanted] == ["one", "two", "large"]
    assert not any(one.backend.closed for one in world.table.wanted)  # type: ignore[union-attr]
    assert world.made.count("two") == 1


async def test_a_model_s_time_to_leave_begins_when_an_offer_without_it_is_out(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, "one", "two")
    on_its_way = world.table.offer()
    await world.reload(config("one"))
    world.table.published(on_its_way)  # the network still hears of both
    world.clock.now_s += GRACE_S
    await world.table.keep()
    assert world.of("two").takes_jobs
    world.table.published(world.table.offer())
    await world.table.keep()
    assert world.of("two").takes_jobs
    world.clock.now_s += GRACE_S
    await world.table.keep()
    assert [one.config.name for one in world.table.all] == ["one"]


async def test_a_former_engine_of_an_offered_model_leaves_though_the_model_is_offered(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, "one")
    (former,) = world.table.all
    await world.reload(config("one", engine="openai", url="http://127.0.0.1:1"))
    world.table.published(world.table.offer())
    world.clock.now_s += GRACE_S
    await world.table.keep()
    assert former not in world.table.all
    assert former.backend.closed  # type: ignore[union-attr]


async def test_a_reload_that_breaks_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    world = World(tmp_path, "one")

    async def broken(_: ModelConfig) -> ServedModel | None:
        raise RuntimeError("not one of ours")

    well, world.reloader._prepare = world.reloader._prepare, broken
    code, told = await world.reload(config("one"), config("two"))
    assert (code, told["ok"]) == (500, False)
    assert "log" in told["message"]
    assert world.reloader.last == told
    world.reloader._prepare = well
    assert (await world.reload(config("one"), config("two")))[0] == 200


async def test_an_embeddings_engine_that_fails_its_jobs_must_give_a_vector(tmp_path: Path) -> None:
    world = World(tmp_path, "one")
    ill = served(config("ill", kind="embeddings"), world.clock)
    table = ModelTable([ill], world.clock, grace_s=GRACE_S)
    await ill.start()
    for _ in range(3):
        ill.count(Status.FAILED, (0, 0, 0, 0))
    await table.keep()
    assert table.away() == (ill.model_id,)


async def test_an_engine_that_takes_long_to_start_holds_up_no_other_s_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.provider.models.START_LOOK_S", 0.01)
    world = World(tmp_path, "slow")
    (slow,) = world.table.all
    backend: Any = slow.backend
    backend.ready.clear()
    async with asyncio.timeout(20):
        await world.table.keep()
    assert world.table.away() == (slow.model_id,)
    backend.ready.set()
    async with asyncio.timeout(20):
        while not slow.engine.up:  # noqa: ASYNC110 - its start goes on by itself
            await asyncio.sleep(0)
    await world.table.keep()
    assert world.table.away() == ()
    assert slow.backend is backend
