"""The loopback server and the bounds of the metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from cocoon.kernel.errors import ConfigurationError
from cocoon.telemetry import metrics
from cocoon.telemetry.observe import MAX_HEAD_BYTES, serve_observe


@pytest.fixture
async def served() -> AsyncIterator[tuple[str, dict[str, bool]]]:
    health = {"bus": True, "log": True}
    port, close = await serve_observe("127.0.0.1", 0, lambda: health)
    yield f"http://127.0.0.1:{port}", health
    await close()


async def test_health_is_the_conjunction_of_its_conditions(
    served: tuple[str, dict[str, bool]],
) -> None:
    base, health = served
    async with httpx.AsyncClient(base_url=base, trust_env=False) as client:
        assert (await client.get("/healthz")).status_code == 200
        health["log"] = False
        answer = await client.get("/healthz")
    assert answer.status_code == 503
    assert json.loads(answer.text) == {"bus": True, "log": False}


async def test_metrics_are_served_and_nothing_else(served: tuple[str, dict[str, bool]]) -> None:
    metrics.DISPATCHES.inc("busy")
    async with httpx.AsyncClient(base_url=served[0], trust_env=False) as client:
        text = (await client.get("/metrics")).text
        assert 'cocoon_dispatches_total{outcome="busy"}' in text
        assert (await client.get("/")).status_code == 404
        assert (await client.post("/metrics", content=b"x")).status_code == 405


async def test_an_endless_head_is_cut_off(served: tuple[str, dict[str, bool]]) -> None:
    host, _, port = served[0].removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /" + b"a" * (4 * MAX_HEAD_BYTES))
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await writer.wait_closed()


async def test_only_loopback_is_served() -> None:
    with pytest.raises(ConfigurationError):
        await serve_observe("0.0.0.0", 0, dict)  # noqa: S104


def test_label_values_outside_their_bounds_count_as_other() -> None:
    for n in range(500):
        metrics.REFUSALS.inc(f"code_{n}")
        metrics.REFUSALS.inc(f"Prompt text {n}")
        metrics.DISPATCHES.inc(f"outcome{n}")
    text = metrics.render().decode()
    assert "Prompt" not in text
    assert text.count("cocoon_refusals_total{") <= 65
    assert 'cocoon_dispatches_total{outcome="other"}' in text


def test_a_metric_wants_all_its_labels() -> None:
    with pytest.raises(ValueError, match="one value for each"):
        metrics.TAIL_LAG.set(1, 0)
