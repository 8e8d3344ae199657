"""A provider may ask how the network sees it: what was refused it last, and why it was dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cocoon.contracts.messages import BanRequest
from cocoon.kernel.errors import CocoonError
from tests.support.attestation_world import Network, Provider, now_ms
from tests.support.servers import Bus, Database


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    return Network(bus, database, tmp_path)


async def becomes(provider: Provider, check: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(200):
        told = await provider.ask("standing")
        if check(told):
            return told
        await asyncio.sleep(0.02)
    raise AssertionError(told)


async def test_a_standing_is_told_from_the_first_question_to_the_ban(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        fresh = await provider.ask("standing")
        assert (fresh["enrolled"], fresh["tier"], fresh["last_refusal"]) == (False, None, None)
        with pytest.raises(CocoonError) as refused:
            await provider.publish_offer()
        told = await provider.ask("standing")
        assert told["last_refusal"]["code"] == refused.value.code
        assert told["last_refusal"]["verb"] == "publish_offer"
        assert told["last_refusal"]["message"] == refused.value.message
        await provider.admitted()
        await provider.beat()
        listed = await becomes(provider, lambda one: bool(one["listed"]))
        assert (listed["attested"], listed["tier"], listed["banned"]) == (True, "simulated", False)
        assert listed["evidence_valid_until_ms"] > now_ms()
        assert listed["key_valid_until_ms"] > now_ms()
        assert listed["revoked"] is None
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id))
        dropped = await becomes(provider, lambda one: one["revoked"] is not None)
        assert dropped["revoked"]["reason"] == "banned"
        assert (dropped["attested"], dropped["listed"], dropped["banned"]) == (False, False, True)
