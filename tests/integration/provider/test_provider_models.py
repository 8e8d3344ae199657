"""Several models in one agent, from one file: by name, by price, each with its own life."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cocoon.agent import ModelConfig
from cocoon.agent.door import find_door
from cocoon.domain.pricing import TokenCounts, price
from cocoon.evidence.provider import parse_evidence
from cocoon.kernel.errors import ConfigurationError, Forbidden, NotFound, Unavailable
from cocoon.sealing import Status
from services.provider import main as agent_main
from services.provider.enclave import Enclave
from services.provider.settings import SHIPPED_MODEL
from tests.support.engine_process import MODEL, engine_process
from tests.support.provider_file import CHEAP, DEAR, ProviderFile, model
from tests.support.provider_world import ENDLESS, Job, Opened, ProviderWorld, end

WELL = (Status.COMPLETE, Status.LENGTH)


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.provider.main.HEALTH_S", 0.1)


def assert_priced_by_its_match(job: Job, answer: Opened) -> None:
    receipt = answer.receipt
    counts = TokenCounts(
        receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens,
        receipt.reasoning_tokens,
    )  # fmt: skip
    assert receipt.status in WELL
    assert receipt.model_id.hex() == job.quote.model_id
    assert receipt.price_nanoton == price(job.quote, counts) > 0


async def begun(world: ProviderWorld, of: str) -> Job:
    """An endless answer of a model, as it goes on."""
    job = await world.accepted(world.seal(of=of, **ENDLESS), quote=world.quote(of))
    await job.began.wait()
    return job


async def ask(world: ProviderWorld, of: str, **options: Any) -> tuple[Job, Opened]:
    job = await world.accepted(
        world.seal(of=of, max_output=8, **options), quote=world.quote(of)
    )  # fmt: skip
    return job, await world.ended(job)


async def test_two_models_are_one_offer_and_each_answers_at_its_own_price(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model(concurrency=3), model("dear", DEAR, concurrency=2))
    async with world.agent(**file.settings):
        (offer,) = world.offers
        assert ([one.name for one in offer.models], offer.concurrency) == (["skills-1", "dear"], 5)
        assert {one.model_id for one in offer.models} == set(world.evidence[-1].models)
        for name, prices in (("skills-1", CHEAP), ("dear", DEAR)):
            job, answer = await ask(world, name)
            assert job.quote.output_nanoton_per_mtok == prices.output
            assert_priced_by_its_match(job, answer)
        crossed = world.seal(of="skills-1", max_output=8)
        reply, _ = await world.dispatch(crossed, quote=world.quote("dear"))
        assert (reply.accepted, reply.code) == (False, "bad_request")
        cheaper = world.quote("dear").model_copy(
            update=world.quote().model_dump(exclude={"model_id"})
        )
        reply, _ = await world.dispatch(world.seal(of="dear"), quote=cheaper)
        assert (reply.accepted, reply.code) == (False, "bad_request")
        told = await file.status()
        assert told["provider_id"] == world.provider_id
        assert (told["tier"], told["standing"]["attested"]) == ("simulated", True)
        assert told["bus"]["connected"]
        assert told["gpus_found"] == "none found" or told["gpus"]
        for one in told["models"]:
            assert one["jobs"] == 1
            assert one["output_tokens"] > 0
            assert one["tokens_per_s"] > 0
            assert (one["enabled"], one["warm"], one["healthy"]) == (True, True, True)
        assert told["models"][1]["price"] == DEAR.model_dump()


async def test_each_model_has_its_own_places_and_a_queue_before_its_engine(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model(), model("narrow", concurrency=1, max_waiting=1))
    async with world.agent(**file.settings):
        assert world.offers[-1].concurrency == 16 + 2
        running = await begun(world, "narrow")
        waiting = await world.accepted(
            world.seal(of="narrow", max_output=8), quote=world.quote("narrow")
        )
        await file.until("narrow", running=1, waiting=1)
        narrow = world.quote("narrow").model_id
        await world.until(lambda: world.heartbeats[-1].full == (narrow,), "said to be full")
        assert not world.heartbeats[-1].draining
        reply, _ = await world.dispatch(world.seal(of="narrow"), quote=world.quote("narrow"))
        assert (reply.accepted, reply.code) == (False, "busy")
        await ask(world, "skills-1")  # the other has room
        assert not waiting.began.is_set()
        await world.cancel(running)
        assert_priced_by_its_match(waiting, await world.ended(waiting))
        await world.until(lambda: world.heartbeats[-1].full == (), "free again")


async def test_a_cold_model_is_offered_and_its_engine_starts_at_its_first_job(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model(), model("cold", warm=False))
    async with world.agent(**file.settings):
        assert (await file.model("cold"))["warm"] is False
        jobs = [
            await world.accepted(world.seal(of="cold", max_output=8), quote=world.quote("cold"))
            for _ in range(3)
        ]
        for job in jobs:
            assert_priced_by_its_match(job, await world.ended(job))
        assert (await file.model("cold"))["warm"] is True


async def test_a_cold_model_whose_files_changed_since_they_were_hashed_serves_nobody(
    world: ProviderWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(SHIPPED_MODEL, folder)
    file = ProviderFile(world, model(), model("cold", folder=folder, warm=False))
    async with world.agent(**file.settings):
        content = bytearray((folder / "model.onnx").read_bytes())
        content[-1] ^= 1
        (folder / "model.onnx").write_bytes(content)
        job = await world.accepted(world.seal(of="cold"), quote=world.quote("cold"))
        failed = await world.ended(job)
        assert (failed.receipt.status, failed.receipt.price_nanoton) == (Status.FAILED, 0)
        assert str(folder) not in str(failed.error)
        await ask(world, "skills-1")


async def test_files_that_are_not_the_manifest_s_stop_the_agent_whichever_model_they_are_of(
    world: ProviderWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(SHIPPED_MODEL, folder)
    (folder / "config.json").write_text("{}")
    file = ProviderFile(world, model(), model("cold", folder=folder, warm=False))
    with pytest.raises(ConfigurationError):
        async with world.agent(**file.settings):
            pass
    assert world.offers == []


async def test_an_agent_none_of_whose_engines_answers_ends_with_a_sentence(
    world: ProviderWorld,
) -> None:
    server = {"engine": "openai", "url": "http://127.0.0.1:9", "served_as": "x"}
    file = ProviderFile(world, model("one", **server), model("two", **server))
    with pytest.raises(Unavailable, match="start it first"):
        async with world.agent(**file.settings):
            pass


async def test_a_killed_engine_takes_only_its_model_away_and_it_comes_back(
    world: ProviderWorld,
) -> None:
    async with engine_process() as engine:
        served = model(
            "served", DEAR, engine="openai", url=engine.url, served_as=MODEL, context_tokens=640
        )
        file = ProviderFile(world, model(), served)
        async with world.agent(**file.settings):
            await ask(world, "served")
            model_id = world.quote("served").model_id
            await engine.kill()
            await world.until(lambda: world.heartbeats[-1].away == (model_id,), "said to be away")
            assert not world.heartbeats[-1].draining
            assert (await file.model("served"))["healthy"] is False
            reply, _ = await world.dispatch(world.seal(of="served"), quote=world.quote("served"))
            assert (reply.accepted, reply.code) == (False, "busy")
            await ask(world, "skills-1")
            await engine.start()
            await world.until(lambda: world.heartbeats[-1].away == (), "back")
            assert_priced_by_its_match(*await ask(world, "served"))
            assert len(world.offers) == 1  # the log is not told of every wink


async def test_a_model_moves_to_another_server_under_its_jobs(world: ProviderWorld) -> None:
    async with engine_process() as one, engine_process() as two:
        served = {"engine": "openai", "served_as": MODEL, "context_tokens": 640}
        file = ProviderFile(world, model("served", url=one.url, **served))
        async with world.agent(**file.settings, grace_s=0.2):
            old = world.quote("served")
            job = await world.accepted(world.seal(of="served", max_output=400, stream=True))
            await job.began.wait()
            file.write(model("served", DEAR, url=two.url, **served))
            assert (await file.post("/reload")).status_code == 200
            late = await world.accepted(world.seal(of="served", max_output=8), quote=old)
            assert_priced_by_its_match(late, await world.ended(late))
            assert (await world.ended(job)).receipt.status in WELL
            await world.until(lambda: world.quote("served") != old, "the new offer")
            await one.kill()
            assert_priced_by_its_match(*await ask(world, "served"))
            assert {item.model_id for item in world.offers[-1].models} == {old.model_id}


async def test_a_model_whose_server_is_not_there_yet_joins_when_it_is(
    world: ProviderWorld,
) -> None:
    async with engine_process() as engine:
        await engine.kill()
        late = model("late", engine="openai", url=engine.url, served_as=MODEL, context_tokens=640)
        file = ProviderFile(world, model(), late)
        async with world.agent(**file.settings):
            model_id = world.quote("late").model_id
            await world.until(lambda: world.heartbeats[-1].away == (model_id,), "away")
            await ask(world, "skills-1")
            await engine.start()
            await world.until(lambda: world.heartbeats[-1].away == (), "there")
            await ask(world, "late")


async def test_prices_change_under_load_and_every_job_pays_those_of_its_match(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model(), model("other"))
    async with world.agent(**file.settings, grace_s=1.0):
        old = world.quote()
        done: list[tuple[Job, Opened]] = []
        stopped = asyncio.Event()

        async def caller() -> None:
            while not stopped.is_set():
                done.append(await ask(world, "skills-1"))

        callers = [asyncio.create_task(caller()) for _ in range(4)]
        await world.until(lambda: len(done) > 8, "jobs at the old price")
        file.write(model(price=DEAR), model("other"))
        answer = await file.post("/reload")
        assert (answer.status_code, answer.json()["ok"]) == (200, True)
        late = await world.accepted(world.seal(max_output=8), quote=old)  # matched before
        assert_priced_by_its_match(late, await world.ended(late))
        await world.until(lambda: world.quote() != old, "the new offer")
        seen = len(done)
        await world.until(lambda: len(done) > seen + 8, "jobs at the new price")
        stopped.set()
        await asyncio.gather(*callers)
        for job, opened in done:
            assert_priced_by_its_match(job, opened)
        assert {job.quote.output_nanoton_per_mtok for job, _ in done} == {
            CHEAP.output, DEAR.output,
        }  # fmt: skip

        async def refused() -> bool:
            reply, _ = await world.dispatch(world.seal(max_output=8), quote=old)
            return not reply.accepted and reply.code == "bad_request"

        async with asyncio.timeout(20):
            while not await refused():  # noqa: ASYNC110 - after the grace time, not at once
                await asyncio.sleep(0.1)
        assert (await file.model("skills-1"))["price"] == DEAR.model_dump()
        assert len(world.evidence) == 1  # no new proof for a price


async def test_models_come_and_go_without_a_broken_job(world: ProviderWorld) -> None:
    file = ProviderFile(world, model(), model("leaving"))
    async with world.agent(**file.settings, grace_s=0.2):
        job = await begun(world, "leaving")
        leaving = job.quote.model_id
        file.write(model(), model("coming", DEAR))
        os.kill(os.getpid(), signal.SIGHUP)
        await world.until(
            lambda: [one.name for one in world.offers[-1].models] == ["skills-1", "coming"],
            "the new offer",
        )
        coming = world.quote("coming").model_id
        assert {coming, leaving} <= set(world.evidence[-1].models)
        assert_priced_by_its_match(*await ask(world, "coming"))
        frames = len(job.frames)
        await world.until(lambda: len(job.frames) > frames, "it goes on")
        assert (await file.model("leaving"))["enabled"] is False
        await world.cancel(job)
        answer = await world.ended(job)
        assert (answer.receipt.status, answer.error) == (Status.CANCELLED, None)
        assert answer.receipt.price_nanoton > 0

        async def gone() -> bool:
            return all(one["name"] != "leaving" for one in (await file.status())["models"])

        async with asyncio.timeout(20):
            while not await gone():  # noqa: ASYNC110 - its engine ends at a check
                await asyncio.sleep(0.05)
        await ask(world, "skills-1")


async def test_a_file_that_is_not_taken_changes_nothing_and_says_why(
    world: ProviderWorld, tmp_path: Path
) -> None:
    file = ProviderFile(world, model(concurrency=2))
    async with world.agent(**file.settings):
        assert (await file.post("/reload", token="wrong")).status_code == 401
        assert (await file.post("/drain", token="x")).status_code == 401
        broken = tmp_path / "broken"
        broken.mkdir()
        for write, says in (
            (lambda: file.path.write_text("[["), "is not TOML"),
            (lambda: file.write(model(), region="eu-west"), "[agent] has changed"),
            (lambda: file.write(model(), model("new", folder=broken)), "broken"),
        ):
            write()
            answer = await file.post("/reload")
            assert (answer.status_code, answer.json()["ok"]) == (422, False)
            assert says in answer.json()["message"]
            assert (await file.status())["last_reload"]["message"] == answer.json()["message"]
            assert [one["name"] for one in (await file.status())["models"]] == ["skills-1"]
        assert len(world.offers) == 1
        await ask(world, "skills-1")
        file.write(model(concurrency=1, enabled=False), model("other"))
        assert (await file.post("/reload")).status_code == 200
        await world.until(lambda: len(world.offers) == 2, "the next offer")
        await ask(world, "other")


async def test_draining_loses_nothing_and_says_so_at_once(world: ProviderWorld) -> None:
    file = ProviderFile(world, model(), model("other"))
    process = await world.process(**file.settings, flush_s=20)
    jobs = [
        await world.accepted(
            world.seal(of=of, **{**ENDLESS, "max_output": 60}), quote=world.quote(of)
        )
        for of in ("skills-1", "other")
    ]
    answer = await file.post("/drain")
    assert (answer.status_code, answer.json()["draining"]) == (202, True)
    await world.until(lambda: world.heartbeats[-1].draining, "a heartbeat that says so")
    for job in jobs:
        assert_priced_by_its_match(job, await world.ended(job))
    assert await asyncio.wait_for(process.wait(), 30) == 0
    assert {result.job_id for result in world.submitted} == {job.job_id for job in jobs}
    assert not list((file.data_dir / "spool").iterdir())
    with pytest.raises(NotFound):
        find_door(file.data_dir)


async def test_a_second_signal_ends_the_agent_under_its_jobs(world: ProviderWorld) -> None:
    file = ProviderFile(world, model())
    process = await world.process(**file.settings, drain_s=300, flush_s=300)
    job = await world.accepted(world.seal(**{**ENDLESS, "max_output": 900}, max_input=100))
    await job.began.wait()
    process.send_signal(signal.SIGTERM)
    await world.until(lambda: world.heartbeats[-1].draining, "draining")
    assert process.returncode is None
    await end(process)
    assert not job.ended.is_set()


async def test_a_killed_agent_runs_no_job_of_any_model_again(world: ProviderWorld) -> None:
    world.acknowledge = False
    file = ProviderFile(world, model(), model("other"))
    process = await world.process(**file.settings)
    sealed = {of: world.seal(of=of, max_output=8, temperature=2.0) for of in ("skills-1", "other")}
    first = {}
    for of, one in sealed.items():
        job = await world.accepted(one, quote=world.quote(of))
        first[of] = (await world.ended(job)).raw_receipt
    broken = world.seal(of="other", **ENDLESS, job_id=secrets.token_bytes(16))
    await (await world.accepted(broken, quote=world.quote("other"))).began.wait()
    await end(process, signal.SIGKILL)
    world.submitted.clear()
    process = await world.process(**file.settings)
    try:
        await world.until(lambda: len(world.submitted) >= 2, "both results again")
        kept = {bytes.fromhex(result.receipt) for result in world.submitted}
        assert kept == set(first.values())
        for of, one in sealed.items():
            job = await world.accepted(one, quote=world.quote(of))
            assert (await world.ended(job)).raw_receipt == first[of]
        reply, _ = await world.dispatch(broken, quote=world.quote("other"), epoch=2)
        assert (reply.accepted, reply.code) == (False, "unknown_key")
    finally:
        await end(process, signal.SIGKILL)


async def test_a_profile_that_was_not_taken_is_told_again(world: ProviderWorld) -> None:
    file = ProviderFile(world, model(), model("other"))
    async with world.agent(**file.settings):
        await world.until(lambda: len(world.profile.models) == 2, "both quantisations")
        world.profile_faults.append(Unavailable("attestation is away"))
        file.write(model(), model("other", enabled=False))
        assert (await file.post("/reload")).status_code == 200
        await world.until(lambda: len(world.profile.models) == 1, "the one that is left")
        assert len(world.evidence) == 1


async def test_a_model_that_comes_while_evidence_is_taken_is_proved_before_it_is_offered(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model())
    async with world.agent(**file.settings):
        world.announcements_open.clear()
        file.write(model(), model("second"))
        assert (await file.post("/reload")).status_code == 200
        await world.until(lambda: len(world.evidence) == 2, "evidence of the second")
        file.write(model(), model("second"), model("third"))
        assert (await file.post("/reload")).status_code == 200
        world.announcements_open.set()
        await world.until(lambda: len(world.offers[-1].models) == 3, "the offer of all three")


async def test_a_job_that_is_being_opened_when_the_agent_drains_is_not_begun(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = asyncio.Event(), asyncio.Event()
    whole = Enclave.open

    async def slowly(self: Enclave, envelope: bytes, *, req_hash: bytes) -> Any:
        opening.set()
        await go_on.wait()
        return await whole(self, envelope, req_hash=req_hash)

    file = ProviderFile(world, model())
    async with world.agent(**file.settings):
        job = await begun(world, "skills-1")
        monkeypatch.setattr(Enclave, "open", slowly)
        late = asyncio.create_task(world.dispatch(world.seal()))
        await opening.wait()
        assert (await file.post("/drain")).status_code == 202
        go_on.set()
        reply, _ = await late
        assert (reply.accepted, reply.code) == (False, "busy")
        await world.cancel(job)
        await world.ended(job)


async def test_commands_find_an_agent_whose_door_is_on_the_other_loopback(
    world: ProviderWorld,
) -> None:
    file = ProviderFile(world, model())
    async with world.agent(**file.settings, observe_host="::1"):
        assert (await file.status())["provider_id"] == world.provider_id


async def test_a_model_that_the_policy_lists_no_more_can_be_taken_out_of_the_file(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ProviderFile(world, model(), model("denied"))
    async with world.agent(**file.settings):
        denied, submit, publish = (
            world.quote("denied").model_id, world._do_submit_evidence, world._do_publish_offer
        )  # fmt: skip

        def by_policy(body: bytes) -> dict[str, Any]:
            if denied in parse_evidence(body).models:
                raise Forbidden("the policy does not list it", code="model_denied")
            return submit(body)

        def by_standing(body: bytes) -> dict[str, Any]:
            if len(world.evidence) == 1:
                raise Forbidden("its evidence was revoked", code="not_attested")
            return publish(body)

        monkeypatch.setattr(world, "_do_submit_evidence", by_policy)
        monkeypatch.setattr(world, "_do_publish_offer", by_standing)
        file.write(model())
        assert (await file.post("/reload")).status_code == 200
        await world.until(lambda: len(world.offers[-1].models) == 1, "an offer without it")
        await ask(world, "skills-1")


async def test_a_hangup_while_it_starts_is_a_reload_afterwards(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ProviderFile(world, model())
    prepare = agent_main.prepare_model
    lost: list[int] = []

    async def changed_meanwhile(one: ModelConfig, *context: Any, **options: Any) -> Any:
        if one.name == "skills-1":
            file.write(model(), model("second"))
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
        return await prepare(one, *context, **options)

    monkeypatch.setattr(agent_main, "prepare_model", changed_meanwhile)
    before = signal.signal(signal.SIGHUP, lambda *_: lost.append(1))  # it would end the process
    try:
        async with world.agent(**file.settings):
            await world.until(lambda: len(world.offers[-1].models) == 2 or lost, "both models")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert lost == []
