"""Attestation as an operator starts it: environment in, one ready line out, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from cocoon.kernel.errors import CocoonError
from cocoon.telemetry import metrics
from tests.support.attestation_world import Network, Provider
from tests.support.servers import Bus, Database


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    return Network(bus, database, tmp_path)


@contextlib.asynccontextmanager
async def process(network: Network, **changes: str) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = {
        f"COCOON_ATTESTATION_{name.upper()}": (
            json.dumps(value) if isinstance(value, tuple) else str(value)
        )
        for name, value in network.settings().model_dump(exclude_none=True).items()
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.attestation",
        env={**os.environ, **settings, **changes},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def test_it_says_when_it_is_ready_serves_its_health_and_ends_cleanly(
    network: Network,
) -> None:
    async with process(network) as running:
        assert running.stdout is not None
        ready = json.loads(await asyncio.wait_for(running.stdout.readline(), 20))
        provider = await Provider.connect(network)
        await provider.enrol()
        await provider.attest()
        base = f"http://127.0.0.1:{ready['observe_port']}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as client:
            health = await client.get("/healthz")
            metrics = (await client.get("/metrics")).text
        running.terminate()
        out, err = await asyncio.wait_for(running.communicate(), 20)
    assert health.json() == {"bus": True, "entry": True, "tail": True, "leading": True}
    assert 'cocoon_verdicts_total{code="ok",outcome="ok"} 1.0' in metrics
    assert running.returncode == 0
    assert out == b""
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert {"policy_published", "provider_enrolled", "provider_attested"} <= set(events)
    assert "library_record" not in events


async def test_production_refuses_a_dev_network_in_plain_words(network: Network) -> None:
    async with process(network, COCOON_ATTESTATION_ENVIRONMENT="prod") as running:
        _, err = await asyncio.wait_for(running.communicate(), 20)
        assert running.returncode == 1
    assert b"name the production network's trust file" in err
    assert await network.types() == []


async def test_verdicts_are_counted_under_their_codes(network: Network) -> None:
    def counted(outcome: str, code: str) -> float:
        labels = {"outcome": outcome, "code": code}
        return metrics.REGISTRY.get_sample_value("cocoon_verdicts_total", labels) or 0.0

    before = counted("ok", "ok"), counted("reject", "models_mismatch")
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        with pytest.raises(CocoonError):
            await provider.attest(claims={"models_root": bytes(32)})
    assert counted("ok", "ok") == before[0] + 1
    assert counted("reject", "models_mismatch") == before[1] + 1
