"""A running agent hears that the network dropped it, says so, and comes back where it may."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cocoon.agent.config import AgentConfig
from cocoon.agent.door import find_door
from cocoon.agent.writing import write_config
from cocoon.bus.service import Stop
from cocoon.cli.provider_run import changes
from cocoon.contracts.messages import BanRequest
from cocoon.evidence.policy import policy_hash
from services.provider import main as agent_main
from services.provider.settings import ProviderSettings
from tests.integration.attestation.test_canaries import judged
from tests.integration.attestation.test_standing import becomes
from tests.support.attestation_world import MODEL_ID, Network, Provider
from tests.support.servers import Bus, Database

WAIT_S = 30.0
WATCHING = "standing"  # the agent's task, from when all is announced


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    made = Network(bus, database, tmp_path)
    made.authority.save(tmp_path / "authority.json")
    return made


@dataclass
class Agent:
    """A real agent, seen through its own door."""

    network: Network
    provider_id: str
    lines: list[str]

    async def status(self) -> dict[str, Any]:
        door = await asyncio.to_thread(find_door, self.network.folder / "agent")
        async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
            told: dict[str, Any] = (await http.get(f"{door.observe_url}/status")).json()
        return told

    async def healthz(self) -> dict[str, Any]:
        door = await asyncio.to_thread(find_door, self.network.folder / "agent")
        async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
            told: dict[str, Any] = (await http.get(f"{door.observe_url}/healthz")).json()
        return told

    async def until(self, check: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Its standing once it is so; what `provider run` would say meanwhile is kept."""
        before: dict[str, Any] = {}
        async with asyncio.timeout(WAIT_S):
            while True:
                told = await self.status()
                self.lines += changes(before, told)
                before = told
                standing: dict[str, Any] = told["standing"]
                if check(standing):
                    return standing
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running_agent(network: Network, **changed: Any) -> AsyncIterator[Agent]:
    bus, folder = network.bus, network.folder
    name = bus.providers[0]
    fields: dict[str, Any] = {
        "nats_url": bus.server.url, "nats_seed_file": bus.seed_file(name),
        "data_dir": folder / "agent", "trust_file": folder / "trust.json", "environment": "dev",
        "dev_authority_file": folder / "authority.json", "drain_s": 1.0, "flush_s": 0.1,
        "standing_s": 0.2,
    }  # fmt: skip
    stop = Stop()
    task = asyncio.create_task(agent_main.serve(ProviderSettings(**{**fields, **changed}), stop))
    agent = Agent(network, name, [])
    try:
        async with asyncio.timeout(WAIT_S):
            while not any(one.get_name() == WATCHING for one in asyncio.all_tasks()):
                assert not task.done(), task.exception()
                await asyncio.sleep(0.05)
        yield agent
    finally:
        stop()
        await asyncio.wait_for(task, WAIT_S)
    assert stop.error is None


def why(network: Network, provider_id: str) -> str:
    """What `cocoon provider why` says to the provider's owner."""
    folder = network.folder
    place = folder / "provider.toml"
    write_config(
        AgentConfig.model_validate({
            "network": {"bus": [network.bus.server.url], "trust_file": folder / "trust.json"},
            "agent": {
                "seed_file": network.bus.seed_file(provider_id), "data_dir": folder / "agent",
                "environment": "dev",
            },
            "tee": {"kind": "simulated", "dev_authority_file": folder / "authority.json"},
            "models": [{"name": "skills-1", "price": {"input": 1, "cached_input": 1, "output": 1}}],
        }),
        place,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "cocoon.cli", "provider", "why", "--config", str(place)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_banned_agent_says_so_by_itself_and_a_lifted_ban_brings_it_back(
    network: Network,
) -> None:
    async with network.running(), running_agent(network) as agent:
        assert (await agent.status())["standing"]["attested"]
        assert (await agent.healthz())["announced"] is True
        await network.platform_ask("ban", BanRequest(provider_id=agent.provider_id))
        standing = await agent.until(lambda told: told["revoked"] is not None)
        assert standing["revoked"]["reason"] == "banned"
        assert "Ask the operator" in standing["revoked"]["message"]
        assert not standing["attested"]
        assert (await agent.healthz())["announced"] is False
        said = [line for line in agent.lines if line.startswith("DROPPED")]
        assert said[-1].startswith("DROPPED by the network: banned; This provider")
        told = await asyncio.to_thread(why, network, agent.provider_id)
        assert "is banned, by the network's operator" in told
        assert "its books are not told while it is banned" in told
        await network.platform_ask("ban", BanRequest(provider_id=agent.provider_id, lift=True))
        back = await agent.until(lambda told: bool(told["attested"]))
        assert back["revoked"] is None
        assert (await agent.healthz())["announced"] is True
        same = await Provider.connect(network)
        seen = await becomes(same, lambda told: bool(told["listed"]))  # heartbeats, keys, offer
        assert seen["attested"]


async def test_a_canarys_verdict_is_heard_with_its_remedy_and_nothing_is_proved_against_it(
    network: Network,
) -> None:
    async with network.running(), running_agent(network) as agent:
        provider = await Provider.connect(network)
        offer = [data for kind, data in await network.events() if kind == "OfferPublished"][-1]
        for at in range(5):
            judgement = judged(
                provider, "differed", f"job{at}", model_id=offer.models[0].model_id
            )  # fmt: skip
            await network.platform_ask("canary", judgement)
        standing = await agent.until(lambda told: told["revoked"] is not None)
        assert standing["revoked"]["reason"] == "canary"
        assert "manifest's own files" in standing["revoked"]["message"]
    assert (await network.types()).count("ProviderAttested") == 1


async def test_a_policy_without_its_model_is_heard_and_the_next_policy_brings_the_agent_back(
    network: Network,
) -> None:
    first = network.write_policy()
    async with contextlib.AsyncExitStack() as stack:
        async with network.running():
            agent = await stack.enter_async_context(running_agent(network))
        second = network.write_policy(
            version=2, previous_hash=policy_hash(first).hex(), models=(MODEL_ID,)
        )
        async with network.running():
            standing = await agent.until(lambda told: told["revoked"] is not None)
            assert standing["revoked"]["reason"] == "model_denied"
            assert "Serve a listed model" in standing["revoked"]["message"]
        network.write_policy(version=3, previous_hash=policy_hash(second).hex())
        async with network.running():
            back = await agent.until(lambda told: bool(told["attested"]))
            assert back["revoked"] is None
