"""What a provider tells of itself beside its offer: its region and how its models are quantised."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cocoon.contracts.messages import DirectoryRequest, ProfileRequest
from cocoon.kernel.errors import BadRequest
from tests.support.attestation_world import Network, Provider
from tests.support.servers import Bus, Database


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    return Network(bus, database, tmp_path)


async def entry(network: Network) -> dict[str, Any]:
    """The directory's one entry, once it is there."""
    for _ in range(200):
        answer = await network.platform_ask("directory", DirectoryRequest(model="skills-1"))
        if answer["providers"]:
            found: dict[str, Any] = answer["providers"][0]
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("no provider came into the directory")


async def test_what_a_provider_tells_of_itself_is_in_the_log_once_and_in_the_directory(
    network: Network,
) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        silent = await entry(network)
        assert (silent["region"], silent["quantisation"]) == (None, None)
        await provider.publish_profile()
        await provider.publish_profile()
        told = await entry(network)
        assert (told["region"], told["quantisation"]) == ("eu-west", "int8")
        wrong = ProfileRequest.model_construct(region="Europe, west", models=())
        with pytest.raises(BadRequest):
            await provider.ask("publish_profile", wrong)
    async with network.running():
        await provider.beat()
        again = await entry(network)
        assert (again["region"], again["quantisation"]) == ("eu-west", "int8")
    assert (await network.types()).count("ProviderProfilePublished") == 1
