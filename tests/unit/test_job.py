"""A job is what its events say."""

from __future__ import annotations

import pytest

from cocoon.contracts import events as e
from cocoon.domain.job import JobState, JobStatus, evolve, fold
from tests.support.example_events import EXAMPLES

BY_TYPE = {event.event_type: event for event in EXAMPLES}
MATCHED = ["JobRequested", "FundsHeld", "ProviderMatched"]


@pytest.mark.parametrize(
    ("types", "status", "held"),
    [
        ([], JobStatus.ABSENT, 0),
        (["JobRequested"], JobStatus.REQUESTED, 0),
        (["JobRequested", "FundsHeld"], JobStatus.REQUESTED, 1000),
        (MATCHED, JobStatus.MATCHED, 1000),
        ([*MATCHED, "ResultRejected"], JobStatus.MATCHED, 1000),
        ([*MATCHED, "LeaseExpired"], JobStatus.UNMATCHED, 1000),
        ([*MATCHED, "LeaseExpired", "ProviderMatched"], JobStatus.MATCHED, 1000),
        ([*MATCHED, "ResultSealed"], JobStatus.MATCHED, 1000),
        ([*MATCHED, "ResultSealed", "PaymentSettled"], JobStatus.SETTLED, 0),
        ([*MATCHED, "LeaseExpired", "JobFailed"], JobStatus.FAILED, 0),
        ([*MATCHED, "LeaseExpired", "JobCancelled"], JobStatus.CANCELLED, 0),
        (["JobRequested", "FundsRefused"], JobStatus.REFUSED, 0),
    ],
)
def test_the_events_tell_the_status_and_what_is_held(
    types: list[str], status: JobStatus, held: int
) -> None:
    state = fold(BY_TYPE[name] for name in types)
    assert (state.status, state.held_nanoton, state.version) == (status, held, len(types))
    assert state.status.is_terminal == (bool(types) and types[-1] in e.JOB_ENDS)


def test_every_match_is_remembered_and_only_counted_epochs_count() -> None:
    match = BY_TYPE["ProviderMatched"]
    busy = BY_TYPE["LeaseExpired"].model_copy(update={"counts": False})
    second = match.model_copy(update={"epoch": 2, "provider_id": "prov_2"})
    silent = BY_TYPE["LeaseExpired"].model_copy(update={"provider_id": "prov_2", "epoch": 2})
    state = fold([BY_TYPE["JobRequested"], BY_TYPE["FundsHeld"], match, busy, second, silent])
    assert state.matches == ((1, "prov_1"), (2, "prov_2"))
    assert (state.counted_epochs, state.tried, state.epoch) == (1, ("prov_1", "prov_2"), 2)


def test_a_rejected_epoch_is_remembered_and_the_price_is_what_was_settled() -> None:
    state = fold(BY_TYPE[name] for name in [*MATCHED, "ResultRejected"])
    assert state.rejected_epochs == (1,)
    settled = fold([BY_TYPE["ResultSealed"], BY_TYPE["PaymentSettled"]], state)
    assert settled.price_nanoton == 285
    assert settled.result == BY_TYPE["ResultSealed"]


def test_an_event_of_another_aggregate_changes_nothing_but_the_version() -> None:
    state = evolve(JobState(), BY_TYPE["AccountOpened"])
    assert state == JobState(version=1)
