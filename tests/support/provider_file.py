"""A provider.toml around a test's network, and the agent's own door beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from cocoon.agent import AgentConfig, ModelConfig, ModelPrice, write_config
from cocoon.agent.config import Agent, Network, Tee
from cocoon.agent.door import find_door, read_token
from tests.support.network import LiveNetwork
from tests.support.provider_world import ProviderWorld

CHEAP = ModelPrice(input=20_000_000, cached_input=10_000_000, output=80_000_000)
DEAR = ModelPrice(input=60_000_000, cached_input=30_000_000, output=240_000_000)


def model(name: str = "skills-1", price: ModelPrice = CHEAP, **fields: Any) -> ModelConfig:
    return ModelConfig(**{"name": name, "price": price, **fields})


def file_of(network: LiveNetwork, name: str, path: Path) -> Path:
    """Write the file of one of the network's own providers, by its name there."""
    folder, running = network.folder, network.running
    config = AgentConfig(
        network=Network(
            gateway=running.gateway_url, bus=(running.nats_url,), trust_file=folder.trust,
            policy_file=folder.policy,
        ),
        agent=Agent(
            seed_file=folder.seed(name), data_dir=folder.provider_data(name), environment="dev"
        ),
        tee=Tee(
            kind="simulated", dev_authority_file=folder.authority,
            dev_platform_file=folder.platform(name),
        ),
        models=(model(),),
    )  # fmt: skip
    write_config(config, path)
    return path


class ProviderFile:
    """The file in the world's folder. `write` replaces its models."""

    def __init__(self, world: ProviderWorld, *models: ModelConfig) -> None:
        self.world = world
        self.path = world.folder / "provider.toml"
        self.data_dir = world.folder / "provider"
        self.write(*models)

    def write(self, *models: ModelConfig, **agent: Any) -> None:
        world = self.world
        write_config(
            AgentConfig(
                network=Network(
                    bus=(world.bus.server.url,), trust_file=world.folder / "trust.json"
                ),
                agent=Agent(
                    seed_file=Path(world.bus.seed_file(world.provider_id)),
                    data_dir=self.data_dir, environment="dev", **agent,
                ),
                tee=Tee(kind="simulated", dev_authority_file=world.folder / "authority.json"),
                models=models,
            ),
            self.path,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """For `world.agent` and `world.process`: nothing but the file says what is served."""
        return {"config_file": self.path, "nats_url": "nats://nowhere:1", "concurrency": 1}

    async def status(self) -> dict[str, Any]:
        told: dict[str, Any] = (await self._ask("GET", "/status")).json()
        return told

    async def model(self, name: str) -> dict[str, Any]:
        """A model as /status tells it."""
        return next(one for one in (await self.status())["models"] if one["name"] == name)

    async def post(self, path: str, *, token: str | None = None) -> httpx.Response:
        token = read_token(self.data_dir) if token is None else token
        return await self._ask("POST", path, {"Authorization": f"Bearer {token}"})

    async def until(self, name: str, **fields: Any) -> None:
        """Until /status says so of a model."""
        async with asyncio.timeout(20):
            while True:
                told = await self.model(name)
                if all(told[key] == value for key, value in fields.items()):
                    return
                await asyncio.sleep(0.02)

    async def _ask(
        self, method: str, path: str, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        door = await asyncio.to_thread(find_door, self.data_dir)
        assert door.pid > 0
        async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
            return await http.request(method, door.observe_url + path, headers=headers)
