"""Two providers that change their keys every 12 seconds, and what may befall such a network."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.contracts import events as e
from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.kernel.ids import provider_id
from services.gateway.settings import GatewaySettings
from services.matcher.settings import MatcherSettings
from tests.support.chaos_world import ChaosWorld, Trial, chaos_world, wait_for
from tests.support.collected import Evidence
from tests.support.evidence import reader
from tests.support.network import ROOT

pytestmark = pytest.mark.network
Rows = list[tuple[StoredEvent, e.EventData]]
KEY_EPOCH_S = 12
SILENCE_S = MatcherSettings.model_fields["provider_silence_s"].default
COMMIT_S = 0.1  # a match is announced, and dispatched, before its commit
DISPATCH_S = GatewaySettings.model_fields["dispatch_timeout_s"].default
ROTATIONS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosWorld]:
    folder = tmp_path_factory.mktemp("providers")
    with chaos_world(folder, "--providers", "2", "--key-epoch", str(KEY_EPOCH_S)) as found:
        yield found


def provider_of(world: ChaosWorld, name: str) -> str:
    return provider_id(raw_public(read_seed_file(world.network.folder.seed(name))))


async def count(world: ChaosWorld, event_type: str) -> int:
    conn = await reader(world.network)
    try:
        sql = "SELECT count(*) FROM log.events WHERE type = $1"
        return int(await conn.fetchval(sql, event_type))
    finally:
        await conn.close(timeout=2)


async def until_more(world: ChaosWorld, event_type: str, than: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while await count(world, event_type) <= than:
        assert time.monotonic() < deadline_s, f"no new {event_type} within {timeout_s:.0f} s"
        await asyncio.sleep(0.05)


def two_epochs(evidence: Evidence, jobs: set[str]) -> list[Rows]:
    """The events of those of the jobs that were matched twice."""
    found = []
    for job_id in jobs:
        rows = evidence.jobs.get(job_id, [])
        if sum(isinstance(event, e.ProviderMatched) for _, event in rows) >= 2:
            found.append(rows)
    return found


@asynccontextmanager
async def heartbeats(world: ChaosWorld, ident: str) -> AsyncIterator[list[float]]:
    """Unix seconds at which a provider was heard, as the matcher hears it."""
    network, heard = world.network, list[float]()
    nc = await connect(
        network.running.nats_url, network.folder.seed("operator"), "test", inbox_prefix("operator")
    )
    try:
        await nc.subscribe_direct(subjects.heartbeat(ident), lambda _: heard.append(time.time()))
        yield heard
    finally:
        await close(nc)


def rematched_s(moved: list[Rows], last_heard_s: float, stopped_s: float) -> float:
    """From the moment at which the loss could be noticed to the next match, the slowest one.

    Who was dispatched to a dead provider is told by a dispatch without an answer; whose job ran
    there, by the heartbeats' silence. Unix seconds.
    """
    slowest = float("-inf")
    for rows in moved:
        first, second = (
            stored.recorded_at_us / 1e6
            for stored, event in rows
            if isinstance(event, e.ProviderMatched)
        )
        noticed_s = last_heard_s + SILENCE_S
        if first > stopped_s + COMMIT_S:  # else it may have been accepted just before
            noticed_s = min(noticed_s, first + DISPATCH_S)
        slowest = max(slowest, second - noticed_s)
    return slowest


async def test_keys_change_under_load_and_no_request_fails(world: ChaosWorld) -> None:
    trial = Trial(f"{ROTATIONS} key changes, no fault", at_s=time.monotonic())
    before = await count(world, "KeyBundlePublished")
    async with world.load(max_retries=0) as load:
        await until_more(world, "KeyBundlePublished", before + ROTATIONS - 1, 90)
        await load.answered(8, time.monotonic())
    evidence = await world.judge(trial)

    assert trial.violations == []
    assert world.failures(trial.at_s) == []
    used = {
        event.key_id
        for rows in evidence.jobs.values()
        for _, event in rows
        if isinstance(event, e.ProviderMatched)
    }
    assert len(used) >= ROTATIONS


async def test_a_provider_that_dies_before_its_first_byte_goes_unnoticed(
    world: ChaosWorld,
) -> None:
    dead = provider_of(world, "provider-1")
    trial = Trial("a provider stops, then kill -9, before its first byte", time.monotonic())
    async with (
        world.load(only="bodies", max_retries=0) as load,
        heartbeats(world, dead) as heard,
    ):
        await load.answered(12, trial.at_s)
        expired, old_pid = await count(world, "LeaseExpired"), world.network.pid("provider-1")
        await wait_for(lambda: bool(heard), "a heartbeat")
        fault_s = time.monotonic()
        world.network.send("provider-1", signal.SIGSTOP)
        stopped_s = time.time()
        last_heard_s = heard[-1]
        await until_more(world, "LeaseExpired", expired, 20)
        await asyncio.to_thread(world.network.kill, "provider-1")
        await asyncio.to_thread(world.network.wait_restarted, "provider-1", old_pid)
        trial.restarted_s = time.monotonic() - fault_s
        await load.answered(12, time.monotonic(), 40)
    moved: list[Rows] = []
    jobs = {call.job_id for call in world.history if call.ended_s > fault_s}

    def measure(evidence: Evidence) -> None:
        moved.extend(two_epochs(evidence, jobs))
        trial.rematched_s = rematched_s(moved, last_heard_s, stopped_s)

    await world.judge(trial, measure=measure)

    assert trial.violations == []
    assert world.failures(trial.at_s) == []
    assert moved
    for rows in moved:
        matches = [event for _, event in rows if isinstance(event, e.ProviderMatched)]
        paid = [event for _, event in rows if isinstance(event, e.PaymentSettled)]
        assert [match.epoch for match in matches] == [1, 2]
        assert matches[0].provider_id == dead
        assert [(p.epoch, p.provider_id) for p in paid] == [(2, matches[1].provider_id)]
        assert matches[1].provider_id != dead


async def test_a_provider_that_dies_in_a_stream_ends_it_with_what_was_charged(
    world: ChaosWorld,
) -> None:
    trial = Trial("kill -9 a provider in the middle of streams", time.monotonic())
    async with world.load(8, max_retries=0) as load:
        await load.answered(12, trial.at_s)
        for _ in range(5):
            if world.failures(trial.at_s):
                break
            old_pid, fault_s = world.network.pid("provider-2"), time.monotonic()
            await asyncio.to_thread(world.network.kill, "provider-2")
            await asyncio.to_thread(world.network.wait_restarted, "provider-2", old_pid)
            trial.restarted_s = time.monotonic() - fault_s
            await load.answered(12, time.monotonic(), 40)
    evidence = await world.judge(trial)

    assert trial.violations == []
    lost = world.failures(trial.at_s)
    assert lost
    assert all(call.stream for call in lost)
    for call in lost:
        assert "charged" in call.message
        rows = [event for _, event in evidence.jobs[call.job_id]]
        assert not any(isinstance(event, e.PaymentSettled) for event in rows)
        assert "Nothing was charged" in call.message


async def test_a_wiped_bus_is_rebuilt_while_jobs_go_on(world: ChaosWorld) -> None:
    trial = Trial("NATS's store removed while everything runs", time.monotonic())
    network = world.network
    assert network.process is not None
    async with world.load() as load:
        await load.answered(12, trial.at_s)
        old_pid, fault_s = network.pid("nats"), time.monotonic()
        network.process.send_signal(signal.SIGSTOP)  # the supervisor, so that it does not hurry
        try:
            await asyncio.to_thread(network.kill, "nats")
            shutil.rmtree(network.folder.nats / "jetstream")
        finally:
            network.process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(network.wait_restarted, "nats", old_pid)
        trial.restarted_s = time.monotonic() - fault_s
        await load.answered(12, fault_s, 60)
        trial.at_s = fault_s
    evidence = await world.judge(trial)

    assert trial.violations == []
    assert evidence.streams is not None
    for shard, rows in evidence.logs.items():
        assert len(evidence.streams[shard]) == len(rows)


async def test_a_matcher_that_was_away_is_fenced_by_its_successor(world: ChaosWorld) -> None:
    trial = Trial("a second matcher beside a stopped one", time.monotonic())
    network = world.network
    log_file = network.folder.logs / "matcher.log"
    async with world.load() as load:
        await load.answered(12, trial.at_s)
        zombie = network.pid("matcher")
        trial.at_s = time.monotonic()
        network.send("matcher", signal.SIGSTOP)
        second = await asyncio.to_thread(start_matcher, zombie, network.data / "second.log")
        try:
            await load.answered(12, time.monotonic())
            network.send("matcher", signal.SIGCONT)
            await asyncio.to_thread(network.wait_restarted, "matcher", zombie)
            trial.restarted_s = time.monotonic() - trial.at_s
            await load.answered(12, time.monotonic())
            # the supervisor's new matcher has taken over in its turn
            await wait_for(lambda: second.poll() is not None, "the end of the second matcher")
        finally:
            reap(second)
    await world.judge(trial)

    assert trial.violations == []
    assert second.returncode == 1
    for text in (log_file.read_text(), (network.data / "second.log").read_text()):
        assert "another process owns this shard now; this one must stop" in text


def reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def start_matcher(like_pid: int, log_file: Path) -> subprocess.Popen[bytes]:
    """Another matcher with a running one's settings; returns when it is ready."""
    pairs = Path(f"/proc/{like_pid}/environ").read_bytes().split(b"\0")
    environment = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.matcher"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=log, env={os.fsdecode(k): os.fsdecode(v) for k, v in environment.items()},
        )  # fmt: skip
    assert process.stdout is not None
    assert b'"ready"' in process.stdout.readline()
    return process
