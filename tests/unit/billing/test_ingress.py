"""What billing says to a provider whose result cannot be settled now, or ever."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cocoon.bus.ingress import Incoming
from cocoon.contracts import subjects
from cocoon.contracts.messages import ResultAck, SubmitResult
from cocoon.kernel.errors import BadRequest, CocoonError, Forbidden, Unavailable
from services.billing import early
from services.billing.handlers import Ingress
from services.billing.results import JOB_NOT_COMMITTED

PROVIDER = "prov_" + "1" * 32


class _Failing:
    def __init__(self, error: CocoonError) -> None:
        self._error = error

    def is_live(self, _result: SubmitResult) -> bool:
        return False

    async def on_submit_result(self, *_: object) -> ResultAck:
        raise self._error


class _Bus:
    def __init__(self) -> None:
        self.sent: list[tuple[str, ResultAck]] = []

    async def publish(self, subject: str, body: bytes) -> None:
        self.sent.append((subject, ResultAck.model_validate_json(body)))


def _incoming(age_s: float, job: str = "2" * 32, provider: str = PROVIDER) -> Incoming:
    result = SubmitResult(
        provider_id=provider, job_id=job, epoch=1, receipt="3" * 840, blob_hash="4" * 64,
        response_bytes=9, signature="5" * 128,
    )  # fmt: skip
    subject = subjects.submit_result(provider)
    return Incoming(subject, {}, result.to_canonical(), deliveries=1, age_s=age_s)


def _ingress(error: CocoonError) -> tuple[Ingress, _Bus]:
    bus = _Bus()
    return Ingress(cast("Any", _Failing(error)), cast("Any", bus), wait_s=15), bus


async def test_an_outage_of_postgres_never_makes_a_provider_drop_its_result() -> None:
    ingress, bus = _ingress(Unavailable("Postgres is not available"))
    with pytest.raises(Unavailable):
        await ingress.on_message(_incoming(age_s=3600))
    assert bus.sent == []


async def test_a_result_before_its_match_is_committed_comes_again() -> None:
    ingress, bus = _ingress(Unavailable("not in the log yet", code=JOB_NOT_COMMITTED))
    with pytest.raises(Unavailable):
        await ingress.on_message(_incoming(age_s=1))
    assert bus.sent == []


@pytest.mark.parametrize(
    ("error", "age_s", "reason"),
    [
        (Unavailable("not in the log yet", code=JOB_NOT_COMMITTED), 16.0, "no_such_job"),
        (Forbidden("signed by another", code="forbidden"), 0.0, "forbidden"),
    ],
)
async def test_a_result_that_nobody_asked_for_is_refused_for_good(
    error: CocoonError, age_s: float, reason: str
) -> None:
    ingress, bus = _ingress(error)
    await ingress.on_message(_incoming(age_s))
    [(subject, ack)] = bus.sent
    assert subject == subjects.acks(PROVIDER)
    assert (ack.outcome, ack.reason) == ("result_rejected", reason)


async def test_a_flood_of_unknown_jobs_is_dropped_without_an_answer_and_the_rest_waits() -> None:
    ingress, bus = _ingress(Unavailable("not in the log yet", code=JOB_NOT_COMMITTED))
    waiting = [_incoming(age_s=1, job=f"{n:032x}") for n in range(early.MAX_OF_ONE)]
    for _ in range(2):  # what waits is let in again when it comes again
        for incoming in waiting:
            with pytest.raises(Unavailable):
                await ingress.on_message(incoming)
    with pytest.raises(BadRequest) as dropped:  # Rejected: the queue forgets it, nobody is told
        await ingress.on_message(_incoming(age_s=1, job="f" * 32))
    assert dropped.value.code == "too_many_early"
    with pytest.raises(Unavailable):
        await ingress.on_message(_incoming(age_s=1, job="f" * 32, provider="prov_" + "2" * 32))
    assert bus.sent == []


async def test_a_decided_result_makes_room() -> None:
    ingress, bus = _ingress(Unavailable("not in the log yet", code=JOB_NOT_COMMITTED))
    for n in range(early.MAX_OF_ONE):
        with pytest.raises(Unavailable):
            await ingress.on_message(_incoming(age_s=1, job=f"{n:032x}"))
    await ingress.on_message(_incoming(age_s=16, job=f"{0:032x}"))
    assert [ack.reason for _, ack in bus.sent] == ["no_such_job"]
    with pytest.raises(Unavailable):
        await ingress.on_message(_incoming(age_s=1, job="f" * 32))
