"""What the log says of a provider: by the published formula, and nothing that a client did."""

from __future__ import annotations

import pytest

from cocoon.contracts.events import EventData, LeaseExpired, ResultSealed
from cocoon.domain.reputation import Reputation, moved, observe
from tests.support.job_world import ALICE, hex16, hex32, matched_job, receipt_for

JOB = hex16("job")


def result(status: str = "complete", *, took_ms: int = 1000, output: int = 51) -> ResultSealed:
    receipt = receipt_for(matched_job(), first_ms=1_000, last_ms=1_000 + took_ms)
    return ResultSealed(
        job_id=JOB, provider_id=ALICE.id, epoch=1, status=status,  # type: ignore[arg-type]
        receipt=receipt.sign(ALICE.signer).hex(), resp_hash=hex32("r"), blob_hash=hex32("b"),
        response_bytes=1, input_tokens=1, cached_input_tokens=0, output_tokens=output,
        reasoning_tokens=0,
    )  # fmt: skip


def expired(reason: str, *, counts: bool = True) -> LeaseExpired:
    return LeaseExpired(
        job_id=JOB, provider_id=ALICE.id, epoch=1, reason=reason, counts=counts  # type: ignore[arg-type]
    )  # fmt: skip


def after(*events: EventData, start: Reputation | None = None) -> Reputation:
    found = start or Reputation()
    for event in events:
        found = observe(found, event)
    return found


@pytest.mark.parametrize("reason", ["expired", "silent", "rejected", "gone"])
def test_a_job_that_its_provider_lost_counts_a_twentieth(reason: str) -> None:
    found = after(expired(reason))
    assert (found.ended_jobs, found.success_ppm) == (1, 950_000)
    assert after(expired(reason), start=found).success_ppm == 902_500


@pytest.mark.parametrize("reason", ["busy", "refused", "revoked"])
def test_what_is_not_its_fault_says_nothing(reason: str) -> None:
    assert after(expired(reason)) == Reputation()
    assert after(expired("silent", counts=False)) == Reputation()


@pytest.mark.parametrize("status", ["cancelled", "refused"])
def test_what_the_client_did_says_nothing(status: str) -> None:
    assert after(result(status)) == Reputation()


def test_an_enclave_that_says_it_failed_counts_as_a_failure() -> None:
    assert (after(result("failed")).ended_jobs, after(result("failed")).success_ppm) == (1, 950_000)


@pytest.mark.parametrize("status", ["complete", "length"])
def test_an_answer_counts_as_a_success_and_tells_its_speed(status: str) -> None:
    low = Reputation(ended_jobs=3, success_ppm=500_000)
    found = after(result(status), start=low)
    assert (found.ended_jobs, found.success_ppm) == (4, 525_000)
    assert (found.tokens_per_s, found.measured_answers) == (50, 1)  # 50 after the first, in 1 s


@pytest.mark.parametrize(("took_ms", "output"), [(0, 51), (1000, 1), (1000, 0)])
def test_an_answer_that_cannot_be_measured_leaves_the_speed(took_ms: int, output: int) -> None:
    found = after(result(took_ms=took_ms, output=output))
    assert (found.ended_jobs, found.tokens_per_s, found.measured_answers) == (1, 0, 0)


def test_the_shortest_time_and_the_fewest_tokens_are_measured() -> None:
    assert after(result(took_ms=1, output=2)).tokens_per_s == 1000
    assert after(result(took_ms=1, output=2**32 - 1)).tokens_per_s == 2**32 - 1  # the field's most


def test_speed_moves_by_a_half_and_later_by_a_tenth() -> None:
    assert moved(0, 800, 0) == 800
    assert moved(800, 400, 1) == 600
    assert moved(800, 400, 7) == 600
    assert moved(800, 400, 8) == 760
    found = after(result(), result(output=101))
    assert (found.tokens_per_s, found.measured_answers) == (75, 2)


def test_a_success_never_falls_below_nothing_nor_rises_above_all() -> None:
    lost = after(*[expired("silent")] * 500)
    assert 0 <= lost.success_ppm < 20
    assert after(*[result()] * 500, start=lost).success_ppm <= 1_000_000
