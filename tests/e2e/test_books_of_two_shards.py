"""What a provider is told of its money and its lost jobs is the sum over both account shards."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.agent.config import read_config
from cocoon.cli.provider_session import provider_id_of
from cocoon.contracts.events import PaymentSettled, ProviderMatched
from cocoon.eventlog.connection import connect
from cocoon.eventlog.read import read_batch
from tests.support.network import ROOT, LiveNetwork
from tests.support.provider_file import file_of
from tests.support.two_shards import TwoShards, customer, two_shards

pytestmark = [pytest.mark.network, pytest.mark.timeout(240)]
JOBS = {1: 3, 2: 2}  # by shard: how many want the first provider first; one more wants the other


@dataclass
class World:
    network: LiveNetwork
    shards: TwoShards
    files: dict[str, Path]  # provider id -> its file

    def told(self, provider_id: str, *arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "cocoon.cli", "provider", *arguments, "--json",
             "--config", str(self.files[provider_id])],
            cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    options = ("--shards", "2", "--providers", "2")
    try:
        with (
            LiveNetwork(folder / "data", options) as network,
            two_shards(network, "unused") as shards,
        ):
            names = ("provider-1", "provider-2")
            paths = [file_of(network, name, folder / f"{name}.toml") for name in names]
            files = {provider_id_of(read_config(path)): path for path in paths}
            for shard in JOBS:
                shards.customers[shard] = asyncio.run(customer(network, shard))
            yield World(network, shards, files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def done(world: World) -> dict[str, dict[int, set[str]]]:
    """Provider id -> shard -> the jobs that it got, as their clients were told."""
    first, second = world.files
    found: dict[str, dict[int, set[str]]] = {first: {}, second: {}}
    for shard, count in JOBS.items():
        client = openai.OpenAI(
            base_url=world.shards.sidecar, api_key=world.shards.customers[shard].api_key,
            max_retries=0,
        )  # fmt: skip
        for wanted in [*([first] * count), second]:
            answer = client.chat.completions.with_raw_response.create(
                model="skills-1", messages=[{"role": "user", "content": "Repeat: amber"}],
                extra_body={"provider": {"order": [wanted]}},
            )  # fmt: skip
            got = found[wanted].setdefault(shard, set())
            got.add(answer.headers["x-cocoon-job-id"])
    return found


async def logged(world: World) -> dict[int, list[Any]]:
    dsn = world.network.folder.dsn("reader").read_text(encoding="utf-8").strip()
    conn = await connect(dsn, "test")
    try:
        return {
            shard: [event.decode() for event in await read_batch(conn, shard, 1, 1000)]
            for shard in JOBS
        }
    finally:
        await conn.close()


def earnings(world: World, provider_id: str, jobs: int) -> dict[str, Any]:
    """Once the books hold so many jobs."""
    ends_s = time.monotonic() + 30
    while True:
        found: dict[str, Any] = world.told(provider_id, "earnings", "--by", "job")
        if found["total"]["jobs"] >= jobs:
            return found
        assert time.monotonic() < ends_s, found
        time.sleep(0.2)


def test_earnings_are_the_payments_of_both_shards(
    world: World, done: dict[str, dict[int, set[str]]]
) -> None:
    for provider_id, by_shard in done.items():
        jobs = set().union(*by_shard.values())
        found = earnings(world, provider_id, len(jobs))
        paid = {
            shard: sum(
                event.provider_nanoton for event in events
                if isinstance(event, PaymentSettled) and event.provider_id == provider_id
            )
            for shard, events in asyncio.run(logged(world)).items()
        }  # fmt: skip
        assert all(paid.values())  # each shard has paid it
        total = sum(paid.values())
        assert total == int(found["total"]["earned_nanoton"]) == int(found["balance_nanoton"])
        assert {row["job_id"] for row in found["rows"]} == jobs
        for by in ("day", "model"):
            rows = world.told(provider_id, "earnings", "--by", by)["rows"]
            assert sum(int(row["earned_nanoton"]) for row in rows) == total


def test_lost_jobs_are_those_of_both_shards(
    world: World, done: dict[str, dict[int, set[str]]]
) -> None:
    first, second = world.files
    matched = {
        event.job_id: event.provider_id
        for events in asyncio.run(logged(world)).values()
        for event in events
        if isinstance(event, ProviderMatched)
    }
    for mine, others in ((first, second), (second, first)):
        lost = set().union(*done[others].values())
        assert {matched[job] for job in lost} == {others}
        told = world.told(mine, "why")["lost"]
        assert {one["job_id"] for one in told} == lost
        assert {one["reason"] for one in told} == {"order"}
    for shard, jobs in done[first].items():
        assert len(jobs) == JOBS[shard]
