"""Key epochs, evidence, policy and restarts of a real agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from cocoon.kernel.errors import ConfigurationError
from cocoon.models.describing import describe_folder
from cocoon.sealing import Status
from services.provider.settings import SHIPPED_MODEL
from tests.support.provider_world import ENDLESS, ProviderWorld, end

FAST = {"epoch_s": 1.2, "overlap_s": 0.8}


async def test_keys_rotate_under_load_without_a_failed_job(world: ProviderWorld) -> None:
    async with world.agent(**FAST, concurrency=32):
        done = 0
        until_s = time.monotonic() + 3.0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < until_s:
                answer = await world.ask(max_output=6)
                assert answer.receipt.status in (Status.COMPLETE, Status.LENGTH)
                done += 1

        await asyncio.gather(*(client() for _ in range(4)))
        assert done > 20
        assert len(world.bundles) >= 3
        assert len({bundle.key_id for bundle in world.bundles}) == len(world.bundles)


async def test_a_key_that_the_network_does_not_have_yet_is_not_the_current_one(
    world: ProviderWorld,
) -> None:
    async with world.agent(**FAST):
        first = world.bundles[-1]
        world.announcements_open.clear()
        await world.until(lambda: len(world.bundles) > 1, "the next bundle on its way")
        assert (await world.ask(bundle=first, max_output=4)).receipt.key_id == first.key_id
        world.announcements_open.set()


async def test_an_agent_tells_where_it_stands_and_how_its_model_is_quantised(
    world: ProviderWorld,
) -> None:
    async with world.agent(region="eu-west"):
        await world.until(lambda: hasattr(world, "profile"), "a profile, after the offer")
        (model,) = world.profile.models
        assert (world.profile.region, model.model_id) == ("eu-west", world.offer.model_id)
        assert model.quantisation == describe_folder(SHIPPED_MODEL, "skills-1").quantisation


async def test_a_key_whose_process_was_killed_is_replaced_at_once(world: ProviderWorld) -> None:
    async with world.agent(epoch_s=600.0, overlap_s=2.0):
        first = world.bundles[-1]
        for holder in _key_holders():
            os.kill(holder, signal.SIGKILL)
        await world.until(lambda: len(world.bundles) > 1, "another key")

        assert world.bundles[-1].key_id != first.key_id
        assert (await world.ask(max_output=4)).receipt.key_id == world.bundles[-1].key_id


async def test_an_ended_key_is_unknown(world: ProviderWorld) -> None:
    async with world.agent(**FAST):
        first = world.bundles[0]
        await world.ask(bundle=first, max_output=4)
        await world.until(lambda: time.time_ns() // 10**6 > first.not_after_ms, "the epoch's end")
        await world.until(lambda: len(world.bundles) > 2, "more keys")
        late = {"not_after_ms": world.bundles[-1].not_after_ms}
        reply, _ = await world.dispatch(world.seal(bundle=first, header=late))
        assert (reply.accepted, reply.code) == (False, "unknown_key")


async def test_a_stream_outlives_its_key(world: ProviderWorld) -> None:
    async with world.agent(epoch_s=0.5, overlap_s=0.3):
        jobs = [await world.accepted(world.seal(**ENDLESS)) for _ in range(2)]
        for job in jobs:
            assert (await world.ended(job)).receipt.status is Status.LENGTH


async def test_evidence_is_renewed_in_time_with_a_new_key(world: ProviderWorld) -> None:
    async with world.agent(renew_s=0.5, overlap_s=2.0):
        await world.until(lambda: len(world.attested) >= 3, "renewed evidence")
        newest = world.bundles[-1]
        answer = await world.ask(max_output=4, bundle=newest)
        assert answer.receipt.evidence_id == newest.evidence_id
        assert len({bundle.evidence_id for bundle in world.bundles}) >= 3


async def test_a_new_policy_is_taken_and_the_old_one_for_an_hour(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.provider.main.POLICY_REFRESH_S", 0.05)
    async with world.agent():
        old = world.policy_hash
        world.write_policy()
        assert world.policy_hash != old
        await asyncio.sleep(0.3)
        await world.ask(max_output=4)
        await world.ask(max_output=4, header={"policy_hash": old})
        (world.folder / "policy.json").write_bytes(b"{}")
        await asyncio.sleep(0.2)
        await world.ask(max_output=4)


async def test_a_simulated_tee_needs_the_dev_environment(world: ProviderWorld) -> None:
    with pytest.raises(ConfigurationError, match="ENVIRONMENT=dev"):
        async with world.agent(environment="prod"):
            pass


async def test_a_killed_agent_submits_its_spooled_result_after_the_restart(
    world: ProviderWorld,
) -> None:
    world.acknowledge = False
    process = await world.process(submit_backoff_s=60.0)
    try:
        sealed = world.seal(max_output=12)
        job = await world.accepted(sealed)
        first = await world.ended(job)
        await world.until(lambda: len(world.submitted) == 1, "a submitted result")
    finally:
        await end(process, signal.SIGKILL)
    world.acknowledge = True
    process = await world.process(submit_backoff_s=60.0)
    try:
        await world.until(lambda: len(world.submitted) >= 2, "submitted again")
        assert world.submitted[1].receipt == first.raw_receipt.hex()
        spool = world.folder / "provider" / "spool"
        await world.until(lambda: not list(spool.iterdir()), "an empty spool")
        # its key died with the first process: the job cannot run again
        reply, _ = await world.dispatch(sealed, epoch=2)
        assert (reply.accepted, reply.code) == (False, "unknown_key")
        await world.ask(max_output=4)
    finally:
        assert await end(process) == 0


async def test_a_spooled_result_answers_a_repeat_after_the_restart(world: ProviderWorld) -> None:
    world.acknowledge = False
    process = await world.process(submit_backoff_s=60.0)
    try:
        sealed = world.seal(max_output=12)
        first = await world.accepted(sealed)
        await world.ended(first)
    finally:
        await end(process, signal.SIGKILL)
    process = await world.process(submit_backoff_s=60.0)
    try:
        again = await world.accepted(sealed)
        await world.ended(again)
        assert again.response() == first.response()
    finally:
        assert await end(process) == 0


async def test_a_term_signal_lets_running_jobs_finish(world: ProviderWorld) -> None:
    process = await world.process()
    try:
        job = await world.accepted(world.seal(**ENDLESS))
        await job.began.wait()
        process.send_signal(signal.SIGTERM)
        await world.until(lambda: world.heartbeats[-1].draining, "a draining heartbeat")
        answer = await world.ended(job)
        assert answer.receipt.status is Status.LENGTH
    finally:
        assert await end(process) == 0


async def test_an_agent_without_a_bus_resubmits_when_it_is_back(world: ProviderWorld) -> None:
    async with world.agent(submit_backoff_s=0.3):
        job = await world.accepted(world.seal(**ENDLESS))
        await job.began.wait()
        await asyncio.to_thread(world.bus.server.kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(world.bus.server.start)
        await world.until(lambda: world.submitted, "submitted after the bus came back")
        assert world.submitted[0].job_id == job.job_id


async def test_key_holders_die_with_the_agent(world: ProviderWorld) -> None:
    process = await world.process()
    try:
        children = _children(process.pid)
        assert children
    finally:
        await end(process, signal.SIGKILL)
    await world.until(lambda: not any(_alive(pid) for pid in children), "no key holder left")


def _key_holders() -> list[int]:
    """Those of the agent in this process."""
    return [
        pid
        for pid in _children(os.getpid())
        if b"services.provider.keyholder" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return "State:\tZ" not in status.read_text() if status.exists() else False
