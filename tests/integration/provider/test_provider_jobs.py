"""Jobs through a real agent with its real model, over a real NATS."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cocoon.bus.sealed import get_sealed
from cocoon.contracts import messages as m
from cocoon.contracts import subjects
from cocoon.domain.pricing import TokenCounts, price
from cocoon.kernel.clock import SystemRandomness
from cocoon.sealing import Profile, Status, check_chain, public_count
from services.provider.backends.onnx import OnnxBackend
from services.provider.settings import SHIPPED_MODEL
from tests.support.engine_server import EngineServer
from tests.support.provider_world import ENDLESS, Job, Opened, ProviderWorld
from tests.support.small_disk import fill, small_disk

COUNTED = "1 2 3 4 5 6 7 8 9"


def owed(world: ProviderWorld, receipt: Any) -> int:
    counts = TokenCounts(
        receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens,
        receipt.reasoning_tokens,
    )  # fmt: skip
    return price(world.quote(), counts)


async def test_a_whole_answer_comes_sealed_with_a_receipt_that_billing_can_price(
    world: ProviderWorld,
) -> None:
    async with world.agent():
        answer = await world.ask(max_output=40)
        (completion,) = answer.objects
        assert completion["object"] == "chat.completion"
        assert completion["choices"][0]["finish_reason"] in ("stop", "length")
        assert completion["usage"] == answer.usage
        receipt = answer.receipt
        assert receipt.status in (Status.COMPLETE, Status.LENGTH)
        assert receipt.output_tokens == 40  # P0 shows counts in 64s, bounded by the header
        assert receipt.input_tokens == 64
        assert receipt.price_nanoton == owed(world, receipt) > 0
        assert receipt.opened_ms <= receipt.first_ms <= receipt.last_ms
        await world.until(lambda: world.submitted, "a submitted result")
        assert bytes.fromhex(world.submitted[0].receipt) == answer.raw_receipt


@pytest.mark.parametrize("profile", [Profile.P1, Profile.P2, Profile.P3])
async def test_a_stream_comes_in_openais_order_under_every_profile(
    world: ProviderWorld, profile: Profile
) -> None:
    async with world.agent():
        answer = await world.ask(
            stream=True, profile=profile, max_output=24, stream_options={"include_usage": True}
        )
        chunks = answer.objects
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == answer.usage
        assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
        assert {chunk["usage"] is None for chunk in chunks[:-1]} == {True}
        assert answer.receipt.price_nanoton == owed(world, answer.receipt)
        if profile is not Profile.P1:
            assert answer.usage is not None
            assert answer.receipt.output_tokens == answer.usage["completion_tokens"]


async def test_the_stream_and_the_whole_answer_say_the_same(world: ProviderWorld) -> None:
    async with world.agent():
        whole = await world.ask(max_output=30)
        stream = await world.ask(max_output=30, stream=True)
        assert whole.text == stream.text


async def test_a_seed_repeats_an_answer_and_stop_texts_end_it(world: ProviderWorld) -> None:
    async with world.agent():
        hot: dict[str, Any] = {"temperature": 1.5, "seed": 11, "max_output": 20}
        first, second = await asyncio.gather(world.ask(**hot), world.ask(**hot))
        assert first.text == second.text
        whole = await world.ask(max_output=30)
        cut = whole.text[3:6]
        stopped = await world.ask(max_output=30, stop=cut)
        assert stopped.text == whole.text[: whole.text.index(cut)]
        assert stopped.receipt.status is Status.COMPLETE


async def test_a_refusal_from_inside_is_sealed_and_free(world: ProviderWorld) -> None:
    async with world.agent():
        cases: list[tuple[dict[str, Any], str | None, str]] = [
            ({"tools": []}, "tools", "unsupported_parameter"),
            ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
            ({"model": "other"}, "model", "model_not_found"),
            ({"max_input": 5}, "messages", "context_length_exceeded"),
            ({"body": b"not json"}, None, "invalid_json"),
            ({"endpoint": "/v1/responses"}, None, "unsupported_endpoint"),
            ({"endpoint": "/v1/embeddings"}, "model", "wrong_endpoint"),
            ({"header": {"max_price_nanoton": 1}}, "max_price", "max_price_too_low"),
            ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ]
        for options, param, code in cases:
            answer = await world.ask(**options)
            assert answer.error is not None
            assert (answer.error["param"], answer.error["code"]) == (param, code)
            assert answer.receipt.status is Status.REFUSED
            assert (answer.receipt.price_nanoton, answer.receipt.output_tokens) == (0, 0)
            assert answer.data == []


async def test_receipts_form_one_chain_in_their_signing_order(world: ProviderWorld) -> None:
    async with world.agent():
        answers = await asyncio.gather(*(world.ask(max_output=8) for _ in range(6)))
        answers.append(await world.ask(tools=[]))
        chain = sorted(answers, key=lambda answer: answer.receipt.seq)
        previous = None
        for answer in chain:
            check_chain(previous, answer.raw_receipt)
            previous = answer.raw_receipt


async def test_a_cancelled_stream_is_paid_for_what_was_delivered(world: ProviderWorld) -> None:
    async with world.agent():
        sealed = world.seal(**ENDLESS)
        job = await world.accepted(sealed)
        await job.began.wait()
        await world.until(lambda: len(job.frames) > 2, "some text")
        await world.cancel(job)
        answer = await world.ended(job)
        assert answer.receipt.status is Status.CANCELLED
        assert 0 < answer.receipt.output_tokens < 600
        assert len(answer.text) <= answer.receipt.output_tokens
        assert answer.receipt.price_nanoton == owed(world, answer.receipt) > 0


async def test_a_cancelled_whole_answer_delivered_nothing_and_is_free(world: ProviderWorld) -> None:
    async with world.agent():
        job = await world.accepted(world.seal(max_output=600, logit_bias=ENDLESS["logit_bias"]))
        await world.cancel(job)
        answer = await world.ended(job)
        assert answer.receipt.status is Status.CANCELLED
        assert (answer.data, answer.receipt.price_nanoton) == ([], 0)


async def test_a_repeated_dispatch_gets_the_same_bytes_and_no_second_run(
    world: ProviderWorld,
) -> None:
    world.acknowledge = False
    async with world.agent():
        sealed = world.seal(temperature=2.0, max_output=30)
        first = await world.accepted(sealed)
        again = await world.accepted(sealed)  # while it runs, or just after
        world.jobs[(first.job_id, 1)] = first
        one = await world.ended(first)
        repeated = await world.accepted(sealed)
        two = await world.ended(repeated)
        assert first.response() == repeated.response()
        assert one.raw_receipt == two.raw_receipt
        assert again.job_id == first.job_id
        # after the acknowledgement the bytes come from SEALED
        await world.until(lambda: world.submitted, "a submitted result")
        await world.send_ack(world.submitted[0])
        await world.until(lambda: not list((world.folder / "provider/spool").iterdir()), "settled")
        late = await world.accepted(sealed)
        await world.ended(late)
        assert late.response() == first.response()


async def test_a_running_job_follows_its_new_lease(world: ProviderWorld) -> None:
    async with world.agent():
        sealed = world.seal(**ENDLESS)
        first = await world.accepted(sealed, epoch=1)
        await first.began.wait()
        second = await world.accepted(sealed, epoch=2)
        answer = await world.ended(second)
        assert answer.receipt.epoch == 2
        assert not first.ended.is_set()


async def test_another_envelope_under_the_same_job_is_refused(world: ProviderWorld) -> None:
    async with world.agent():
        sealed = world.seal(max_output=8)
        await world.ended(await world.accepted(sealed))
        message, _ = await world.dispatch(sealed, **{"Cocoon-Req-Hash": "00" * 32})
        assert (message.accepted, message.code) == (False, "bad_request")


async def test_a_job_id_that_another_shards_job_has_here_is_refused(world: ProviderWorld) -> None:
    world.acknowledge = False
    async with world.agent(concurrency=4):
        job_id = secrets.token_bytes(16)
        together = await asyncio.gather(*(
            world.dispatch(world.seal(**ENDLESS, job_id=job_id), epoch=epoch) for epoch in (1, 2)
        ))  # fmt: skip
        assert sorted(reply.accepted for reply, _ in together) == [False, True]
        job = next(job for reply, job in together if reply.accepted)
        await job.began.wait()
        reply, _ = await world.dispatch(world.seal(job_id=job_id), epoch=3)
        assert (reply.accepted, reply.code) == (False, "bad_request")
        await world.cancel(job)
        await world.ended(job)
        reply, _ = await world.dispatch(world.seal(job_id=job_id), epoch=4)  # it is spooled
        assert (reply.accepted, reply.code) == (False, "bad_request")


async def test_large_envelopes_come_through_sealed(world: ProviderWorld) -> None:
    async with world.agent():
        job = await world.accepted(world.seal(max_output=8), through_sealed=True)
        assert (await world.ended(job)).receipt.status in (Status.COMPLETE, Status.LENGTH)


async def test_the_whole_response_is_in_sealed_under_its_digest(world: ProviderWorld) -> None:
    async with world.agent():
        job = await world.accepted(world.seal(max_output=8))
        await world.ended(job)
        await world.until(lambda: world.submitted, "a submitted result")
        result = world.submitted[0]
        blob = await get_sealed(world.gateway, world.provider_id, result.blob_hash)
        assert blob == job.response()
        assert result.response_bytes == len(blob)


async def test_requests_that_this_enclave_may_not_serve_get_a_coarse_code(
    world: ProviderWorld,
) -> None:
    async with world.agent():
        quote = world.quote()
        dear = quote.model_copy(update={"output_nanoton_per_mtok": 1})
        cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
            ({"policy_hash": bytes(32)}, {}, "wrong_policy"),
            ({"not_after_ms": 1}, {}, "expired"),
            ({"not_after_ms": world.bundles[-1].not_after_ms + 1}, {}, "bad_request"),
            ({"model_id": bytes(32)}, {}, "bad_request"),
            ({}, {"quote": dear}, "bad_request"),
            ({}, {"Cocoon-Job": secrets.token_hex(16)}, "bad_request"),
        ]
        for header, options, code in cases:
            reply, _ = await world.dispatch(world.seal(header=header), **options)
            assert (reply.accepted, reply.code) == (False, code), (header, options)
        assert world.submitted == []


async def test_a_dispatch_that_does_not_say_whom_to_answer_is_let_go(world: ProviderWorld) -> None:
    async with world.agent():
        heard: list[str] = []
        nowhere = [
            {"Cocoon-Epoch": "0"}, {"Cocoon-Epoch": "x"}, {"Cocoon-Job": "*"},
            {"Cocoon-Gateway": "gw.*"}, {"Cocoon-Gateway": ">"}, {"Cocoon-Gateway": ""},
        ]  # fmt: skip
        whole = {
            "Cocoon-Job": secrets.token_hex(16), "Cocoon-Epoch": "1",
            "Cocoon-Gateway": world.gateway_id,
        }  # fmt: skip

        async def on_answer(message: Any) -> None:
            heard.append(message.subject.split(".")[3])

        await world.gateway.subscribe(f"tok.{world.gateway_id}.>", cb=on_answer)
        await world.gateway.flush()
        subject = f"cmd.provider.{world.provider_id}.run_job"
        for headers in (*nowhere, {}):
            sent = {**whole, **headers} if headers else {}
            await world.gateway.publish(subject, b"x", headers=sent)
        await world.gateway.publish(subject, b"x", headers=whole)
        await world.until(lambda: bool(heard), "an answer")
        assert heard == [whole["Cocoon-Job"]]


async def test_more_jobs_than_the_offer_are_answered_busy(world: ProviderWorld) -> None:
    async with world.agent(concurrency=2, heartbeat_s=0.05):
        jobs = [await world.accepted(world.seal(**ENDLESS)) for _ in range(2)]
        reply, _ = await world.dispatch(world.seal())
        assert (reply.accepted, reply.code) == (False, "busy")
        await world.until(lambda: any(len(b.running) == 2 for b in world.heartbeats), "heartbeats")
        for job in jobs:
            await world.cancel(job)
            await world.ended(job)
        await world.ask(max_output=4)


async def test_no_prompt_or_answer_is_on_disk_or_in_the_logs(
    world: ProviderWorld, capfd: pytest.CaptureFixture[str]
) -> None:
    world.acknowledge = False
    async with world.agent(log_level="debug"):
        answer = await world.ask("canary-7f3a echo canary-7f3a", max_output=30)
        await world.ask("canary-7f3a", tools=[{"canary-7f3a": 1}])
        assert len(answer.text) > 0
        spooled = b"".join(path.read_bytes() for path in world.folder.rglob("*") if path.is_file())
        assert b"canary-7f3a" not in spooled
    assert "canary-7f3a" not in "".join(capfd.readouterr())


async def test_an_engine_that_is_away_takes_no_jobs_until_it_is_back(
    world: ProviderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.provider.main.HEALTH_S", 0.1)
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=16, randomness=SystemRandomness())
    await engine.start()
    server = EngineServer(engine, "served-name")
    try:
        async with (
            server.serve() as url,
            world.agent(backend_url=url, backend_model="served-name", backend_context_tokens=640),
        ):
            whole = await world.ask(max_output=30)
            stream = await world.ask(max_output=30, stream=True)
            assert whole.text == stream.text
            assert whole.receipt.status in (Status.COMPLETE, Status.LENGTH)
            over = await world.ask(max_input=5)
            assert over.error is not None
            assert over.error["code"] == "context_length_exceeded"
            assert (over.receipt.status, over.receipt.price_nanoton) == (Status.REFUSED, 0)
            server.fault = "cut"
            failed = await world.ask(stream=True)
            assert (failed.receipt.status, failed.receipt.price_nanoton) == (Status.FAILED, 0)
            server.fault = ""
            server.model = "gone"
            await world.until(lambda: world.heartbeats[-1].draining, "a heartbeat that says so")
            reply, _ = await world.dispatch(world.seal())
            assert (reply.accepted, reply.code) == (False, "busy")
            server.model = "served-name"
            await world.until(lambda: not world.heartbeats[-1].draining, "back again")
            await world.ask(max_output=4)
    finally:
        await engine.close()


def test_the_agent_loads_no_database_code_and_no_devnet() -> None:
    forbidden = "('asyncpg', 'cocoon.eventlog', 'cocoon.devnet')"
    code = (
        "import sys, services.provider.main; "
        f"sys.exit(any(name.startswith({forbidden}) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_one_body_leaves_in_one_message_with_its_receipt(world: ProviderWorld) -> None:
    async with world.agent():
        job = await world.accepted(world.seal(max_output=8))
        await world.ended(job)
        assert list(job.frames) == [0]


async def test_a_disk_that_fills_up_costs_no_answer_and_takes_no_new_jobs(
    world: ProviderWorld, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk:
        async with world.agent(data_dir=disk):
            job = await world.accepted(world.seal(**{**ENDLESS, "max_output": 100}))
            await job.began.wait()
            fill(disk / "filler")
            assert (await world.ended(job)).receipt.status is Status.LENGTH
            await world.until(lambda: len(world.submitted) == 1, "submitted without the disk")
            reply, _ = await world.dispatch(world.seal())
            assert (reply.accepted, reply.code) == (False, "busy")
            (disk / "filler").unlink()
            assert (await world.ask()).receipt.status is Status.COMPLETE
            await world.until(lambda: not any((disk / "spool").iterdir()), "nothing is left")


LONG_WHOLE: dict[str, Any] = {**ENDLESS, "stream": False, "logprobs": True, "top_logprobs": 20}
BOUND_BYTES = 2**16


def assert_ended_at_its_bound(world: ProviderWorld, job: Job, answer: Opened) -> None:
    header = job.sealed.secrets.header
    if not header.stream:  # a long body comes in pieces
        answer.data = [b"".join(answer.data)]
    receipt, last = answer.receipt, answer.objects[-1]
    assert answer.error is None
    assert receipt.status is Status.LENGTH
    assert BOUND_BYTES // 2 < len(job.response()) <= BOUND_BYTES
    assert last["choices"][0]["finish_reason"] == "length"
    assert answer.usage is not None
    made = answer.usage["completion_tokens"]
    assert 0 < made < ENDLESS["max_output"]
    assert 0 < len(answer.text) <= made
    assert answer.usage["prompt_tokens"] > 0
    assert receipt.output_tokens == public_count(header.profile, made, ENDLESS["max_output"])
    assert receipt.price_nanoton == owed(world, receipt) > 0


@pytest.mark.parametrize(
    "asked",
    [
        ENDLESS,
        {**ENDLESS, "profile": Profile.P2, "logprobs": True, "top_logprobs": 5},
        LONG_WHOLE,
        {**LONG_WHOLE, "profile": Profile.P0},
    ],
    ids=["a bare stream", "a padded stream", "a bare body", "a padded body"],
)
async def test_an_answer_at_the_agents_bound_ends_there_and_is_paid(
    world: ProviderWorld, asked: dict[str, Any]
) -> None:
    async with world.agent(job_max_bytes=BOUND_BYTES):
        job = await world.accepted(world.seal(**asked))
        assert_ended_at_its_bound(world, job, await world.ended(job))
        await world.ask(max_output=4)


async def test_a_body_that_an_engine_gives_at_once_is_cut_at_the_bound(
    world: ProviderWorld,
) -> None:
    engine = OnnxBackend(SHIPPED_MODEL, queue_limit=16, randomness=SystemRandomness())
    await engine.start()
    server = EngineServer(engine, "served-name")
    server.counts_streams = False  # so it is asked for whole bodies
    capabilities = frozenset({"logprobs", "logit_bias"})
    try:
        async with (
            server.serve() as url,
            world.agent(
                job_max_bytes=BOUND_BYTES, backend_url=url, backend_model="served-name",
                backend_context_tokens=1024, backend_capabilities=capabilities,
            ),
        ):  # fmt: skip
            job = await world.accepted(world.seal(**LONG_WHOLE))
            assert_ended_at_its_bound(world, job, await world.ended(job))
    finally:
        await engine.close()


async def test_a_cancel_that_comes_while_the_request_is_being_opened_is_heeded(
    world: ProviderWorld,
) -> None:
    async with world.agent():
        for early in (True, False):  # before the dispatch, or right behind it
            sealed = world.seal(**ENDLESS)
            job_id = sealed.secrets.header.job_id.hex()
            cancel = m.CancelJob(job_id=job_id, epoch=1).to_canonical()
            subject = subjects.cancel_job(world.provider_id)
            if early:
                await world.gateway.publish(subject, cancel)
            asked = asyncio.create_task(world.dispatch(sealed))
            if not early:
                await asyncio.sleep(0)  # the dispatch is on its way
                await world.gateway.publish(subject, cancel)
            reply, job = await asked
            assert reply.accepted
            opened = await world.ended(job)
            assert (opened.receipt.status, opened.receipt.price_nanoton) == (Status.CANCELLED, 0)
            assert opened.data == []
