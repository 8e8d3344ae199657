"""Results of providers through billing's door: valid, forged, stale, repeated, too early."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import cast

import pytest

from cocoon.contracts.envelope import GENESIS_HASH
from cocoon.contracts.events import PaymentSettled
from cocoon.contracts.messages import SubmitResult
from cocoon.eventlog.append import LogAppender
from cocoon.kernel.errors import BadRequest, Forbidden, Unavailable
from cocoon.sealing.receipt import Receipt
from services.billing.results import LiveJobs, Results
from tests.invariants import check_all
from tests.support.job_network import JobNetwork
from tests.support.job_world import (
    ALICE,
    BOB,
    PROVIDERS,
    Provider,
    bytes32,
    hex16,
    hex32,
    receipt_for,
)  # fmt: skip
from tests.support.model_log import ModelAppender, ModelLog


class ModelPool:
    """Answers the one query that results ask of Postgres: a job's or a provider's stream."""

    def __init__(self, *logs: ModelLog) -> None:
        self._logs = {log.shard: log for log in logs}
        self.away = False

    @contextlib.asynccontextmanager
    async def acquire(self, *, timeout: float) -> AsyncIterator[ModelPool]:  # noqa: ASYNC109
        if self.away:
            raise ConnectionRefusedError
        yield self

    async def fetch(self, sql: str, shard: int, stream: str, genesis: bytes):  # type: ignore[no-untyped-def]
        assert "FROM log.events" in sql
        assert genesis == GENESIS_HASH
        names = (
            "position", "version", "type", "schema_version", "event_id", "causation_id",
            "correlation_id", "actor", "traceparent", "prev_hash", "hash", "stream",
        )  # fmt: skip
        return [
            {
                **{name: getattr(row, name) for name in names},
                "recorded_at": row.recorded_at_us,
                "data": row.data.decode(),
            }
            for row in self._logs[shard].stream(stream)
        ]


class Billing:
    """Results over a job network; `tail` brings the log to its memory."""

    def __init__(self) -> None:
        self.network = JobNetwork()
        for provider in PROVIDERS:
            self.network.enrol(provider)
        self.network.open("acct_1", 1_000_000)
        self.appender = ModelAppender(self.network.log, "billing")
        self.live = LiveJobs()
        appenders = {1: cast("LogAppender", self.appender)}
        self.pool = ModelPool(self.network.network, self.network.log)
        self.results = Results(appenders, self.pool, self.live)  # type: ignore[arg-type]
        self._tailed = 0

    async def start(self) -> Billing:
        await self.appender.acquire_term()
        for stored in self.network.network.events:
            self.results.on_network_event(stored)
        return self

    def tail(self) -> None:
        for stored in self.network.log.events[self._tailed :]:
            self.live.apply(stored)
        self._tailed = len(self.network.log.events)

    def request(self, job: str = "job", *, tailed: bool = True) -> Provider:
        self.network.request(job, "acct_1")
        if tailed:
            self.tail()
        return self.holder(job)

    def holder(self, job: str = "job") -> Provider:
        match = self.network.state(job).match
        assert match is not None
        return self.network.providers[match.provider_id]

    def result(self, job: str = "job", **changes: object) -> SubmitResult:
        state = self.network.state(job)
        receipt = receipt_for(state, **changes).sign(self.holder(job).signer)
        return self.holder(job).submit(hex16(job), state.epoch, receipt)

    def types(self, job: str = "job") -> list[str]:
        return [row.type for row in self.network.log.stream(f"job/{hex16(job)}")]


GRANTED = ["JobRequested", "FundsHeld", "ProviderMatched"]


@pytest.mark.parametrize("tailed", [True, False])
async def test_a_valid_result_is_sealed_and_paid_whether_or_not_the_tail_was_faster(
    tailed: bool,
) -> None:
    billing = await Billing().start()
    billing.request(tailed=tailed)
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert (ack.outcome, ack.reason, ack.epoch) == ("result_sealed", "none", 1)
    assert billing.types() == [*GRANTED, "ResultSealed", "PaymentSettled"]
    assert check_all(billing.network.evidence(quiet=True)) == []
    assert billing.live.get(hex16("job")) == []


async def test_a_forged_receipt_is_refused_unpaid_and_named() -> None:
    billing = await Billing().start()
    holder = billing.request()
    state = billing.network.state("job")
    forged = receipt_for(state).sign(BOB.identity)
    ack = await billing.results.on_submit_result(holder.submit(hex16("job"), 1, forged), "")
    assert (ack.outcome, ack.reason) == ("result_rejected", "receipt_sig")
    assert billing.types() == [*GRANTED, "ResultRejected"]


@pytest.mark.parametrize("field", ["receipt", "blob_hash", "epoch", "signature"])
async def test_a_submission_that_the_identity_did_not_sign_reaches_nothing(field: str) -> None:
    billing = await Billing().start()
    billing.request()
    result = billing.result()
    stranger = next(p for p in PROVIDERS if p.id != result.provider_id)
    other = Receipt.decode(bytes.fromhex(result.receipt)).sign(stranger.signer).hex()
    changed = {
        "receipt": other, "blob_hash": hex32("x"), "epoch": 2, "signature": "00" * 64,
    }[field]  # fmt: skip
    with pytest.raises(Forbidden):
        await billing.results.on_submit_result(result.model_copy(update={field: changed}), "")
    assert billing.types() == GRANTED


async def test_a_provider_cannot_submit_another_ones_job() -> None:
    billing = await Billing().start()
    holder = billing.request()
    thief = next(p for p in PROVIDERS if p != holder)
    receipt = receipt_for(billing.network.state("job")).sign(holder.signer)
    with pytest.raises(BadRequest) as refused:
        await billing.results.on_submit_result(thief.submit(hex16("job"), 1, receipt), "")
    assert refused.value.code == "not_matched"
    assert billing.types() == GRANTED


async def test_an_enrolment_that_the_tail_has_not_brought_is_read_from_the_log() -> None:
    billing = Billing()
    await billing.appender.acquire_term()
    billing.request()
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert ack.outcome == "result_sealed"


async def test_a_provider_that_never_enrolled_is_refused_for_good() -> None:
    billing = await Billing().start()
    billing.request()
    stranger = Provider("stranger")
    receipt = receipt_for(billing.network.state("job")).sign(stranger.signer)
    with pytest.raises(Forbidden):
        await billing.results.on_submit_result(stranger.submit(hex16("job"), 1, receipt), "")
    assert billing.types() == GRANTED


async def test_a_result_before_its_match_is_committed_is_asked_to_come_again() -> None:
    billing = await Billing().start()
    elsewhere = await Billing().start()
    elsewhere.request()
    early = elsewhere.result()
    with pytest.raises(Unavailable) as refused:
        await billing.results.on_submit_result(early, "")
    assert refused.value.code == "job_not_committed"
    billing.network.draws = 0
    billing.request()
    ack = await billing.results.on_submit_result(early, "")
    assert ack.outcome == "result_sealed"


async def test_a_result_of_the_next_epoch_waits_for_its_match_like_one_of_the_first() -> None:
    """The second provider is dispatched to before its match is committed, too."""
    billing = await Billing().start()
    elsewhere = await Billing().start()
    for world in (billing, elsewhere):
        world.request()
    elsewhere.network.expire("job", reason="silent")
    early = elsewhere.result()
    assert early.epoch == 2
    with pytest.raises(Unavailable) as refused:
        await billing.results.on_submit_result(early, "")
    assert refused.value.code == "job_not_committed"
    billing.network.expire("job", reason="silent")
    assert (await billing.results.on_submit_result(early, "")).outcome == "result_sealed"


@pytest.mark.parametrize("tailed", [True, False])
async def test_a_repeated_result_is_acknowledged_again_and_paid_once(tailed: bool) -> None:
    billing = await Billing().start()
    billing.request()
    result = billing.result()
    for _ in range(3):
        ack = await billing.results.on_submit_result(result, "")
        assert ack.outcome == "result_sealed"
        if tailed:
            billing.tail()
    assert billing.types().count("PaymentSettled") == 1


async def test_stale_epoch_is_never_paid_though_memory_still_thinks_it_live() -> None:
    billing = await Billing().start()
    billing.request()
    late = billing.result()
    billing.network.expire("job", reason="silent")  # the tail has not brought it
    ack = await billing.results.on_submit_result(late, "")
    assert (ack.outcome, ack.reason) == ("result_rejected", "stale_epoch")
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert ack.outcome == "result_sealed"
    paid = [r.decode() for r in billing.network.log.events if r.type == "PaymentSettled"]
    assert [p.epoch for p in paid if isinstance(p, PaymentSettled)] == [2]
    assert check_all(billing.network.evidence(quiet=True)) == []


async def test_a_result_after_the_end_is_refused_once_and_then_only_acknowledged() -> None:
    billing = await Billing().start()
    billing.request()
    late = billing.result()
    billing.network.expire("job", cancelled=True)
    billing.tail()
    for _ in range(3):
        ack = await billing.results.on_submit_result(late, "")
        assert ack.outcome == "result_rejected"
    assert billing.types().count("ResultRejected") == 1
    assert check_all(billing.network.evidence(quiet=True)) == []


async def test_two_receipts_for_one_epoch_pay_once() -> None:
    billing = await Billing().start()
    billing.request()
    one, other = billing.result(), billing.result(resp_hash=bytes32("another answer"))
    await billing.results.on_submit_result(one, "")
    ack = await billing.results.on_submit_result(other, "")
    assert ack.outcome == "result_sealed"
    assert billing.types().count("PaymentSettled") == 1


async def test_an_append_whose_answer_was_lost_pays_once() -> None:
    billing = await Billing().start()
    billing.request()
    billing.appender.lose_answer()
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert ack.outcome == "result_sealed"
    assert billing.types().count("PaymentSettled") == 1


async def test_a_log_that_is_away_is_nobodys_fault() -> None:
    billing = await Billing().start()
    billing.request()
    billing.appender.fail(Unavailable("Postgres is not available"))
    with pytest.raises(Unavailable):
        await billing.results.on_submit_result(billing.result(), "")
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert ack.outcome == "result_sealed"


async def test_a_log_that_cannot_be_read_is_asked_again_soon() -> None:
    billing = await Billing().start()
    billing.request(tailed=False)
    billing.pool.away = True
    with pytest.raises(Unavailable):
        await billing.results.on_submit_result(billing.result(), "")
    billing.pool.away = False
    ack = await billing.results.on_submit_result(billing.result(), "")
    assert ack.outcome == "result_sealed"


async def test_many_jobs_settle_and_are_forgotten() -> None:
    billing = await Billing().start()
    for index in range(5):
        billing.request(f"job{index}")
        await billing.results.on_submit_result(billing.result(f"job{index}"), "")
        billing.tail()
    assert [billing.live.get(hex16(f"job{index}")) for index in range(5)] == [[]] * 5
    assert ALICE.id in billing.network.providers


@pytest.mark.parametrize("tailed", [(), (1,), (2,), (1, 2)])
async def test_of_two_shards_jobs_of_one_id_the_one_is_settled_whose_request_was_answered(
    tailed: tuple[int, ...],
) -> None:
    one = JobNetwork()
    one.enrol(ALICE)
    two = JobNetwork(ModelLog(2), one.network, one.providers, one.attested_at)
    for shard in (one, two):
        shard.open("acct_1", 1_000_000)
        shard.request("job", "acct_1", req_hash=hex32(f"request of shard {shard.log.shard}"))
    live = LiveJobs()
    for shard in (one, two):
        if shard.log.shard in tailed:
            for stored in shard.log.events:
                live.apply(stored)
    appenders = {shard.log.shard: ModelAppender(shard.log, "billing") for shard in (one, two)}
    for appender in appenders.values():
        await appender.acquire_term()
    pool = ModelPool(one.network, one.log, two.log)
    results = Results(appenders, pool, live)  # type: ignore[arg-type]

    for shard, other in ((two, one), (one, two)):
        before = len(other.log.events)
        receipt = receipt_for(shard.state("job")).sign(ALICE.signer)
        ack = await results.on_submit_result(ALICE.submit(hex16("job"), 1, receipt), "")
        assert ack.outcome == "result_sealed"
        assert shard.log.events[-1].type == "PaymentSettled"
        assert len(other.log.events) == before

    receipt = receipt_for(one.state("job"), req_hash=bytes32("nobody's")).sign(ALICE.signer)
    again = await results.on_submit_result(ALICE.submit(hex16("job"), 1, receipt), "")
    assert again.outcome == "result_sealed"  # a repeat of an outcome, whatever it says now
