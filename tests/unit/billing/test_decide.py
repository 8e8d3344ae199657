"""Billing's pure part: events to ledger lines, results to items and acknowledgements."""

from __future__ import annotations

import pytest

from cocoon.contracts.events import PaymentSettled
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_expire_lease
from cocoon.domain.settling import decide_settle_result
from services.billing.decide import ack_for, project, settle_command, settle_item
from tests.support.example_events import EXAMPLES, settlement, stored
from tests.support.job_network import JobNetwork
from tests.support.job_world import (
    ALICE,
    PROVIDERS,
    expire_command,
    hex16,
    matched_job,
    provider_of,
    receipt_for,
)  # fmt: skip

JOB = f"job/{hex16('job')}"


def test_a_settlement_becomes_lines_changes_and_a_settlement() -> None:
    (row,) = stored(1, JOB, [settlement(held=1000, price=285, provider=270, fee=15)])
    projection = project([row])
    assert projection.entries == [
        (1, 1, 0, f"hold:{hex16('job')}", -1000),
        (1, 1, 1, "provider:prov_1", 270),
        (1, 1, 2, "platform:fees", 15),
        (1, 1, 3, "client:acct_1", 715),
    ]
    assert projection.changes == {
        f"hold:{hex16('job')}": -1000, "provider:prov_1": 270, "platform:fees": 15,
        "client:acct_1": 715,
    }  # fmt: skip
    (paid,) = projection.settlements
    assert (paid.shard, paid.position, paid.event.price_nanoton) == (1, 1, 285)


def test_every_batch_sums_to_zero_and_cutting_it_changes_nothing() -> None:
    rows = stored(1, JOB, EXAMPLES)
    whole = project(rows)
    assert sum(whole.changes.values()) == 0
    parts = [project([row]) for row in rows]
    assert [entry for part in parts for entry in part.entries] == whole.entries
    assert [s for part in parts for s in part.settlements] == whole.settlements


def test_only_payments_are_settlements() -> None:
    for row in stored(1, JOB, EXAMPLES):
        assert len(project([row]).settlements) == (row.type == PaymentSettled.event_type)


def test_an_item_is_fenced_by_the_jobs_version_and_named_by_its_receipt() -> None:
    state = matched_job()
    assert state.match is not None
    provider = provider_of(state.match)

    def item(**changes: object):  # type: ignore[no-untyped-def]
        receipt = receipt_for(state, **changes).sign(provider.signer)
        command = settle_command(provider.submit(hex16("job"), 1, receipt))
        return settle_item(command, state, decide_settle_result(state, command), "")

    assert item().expects == ((JOB, 3),)
    assert [new.data.event_type for new in item().events] == ["ResultSealed", "PaymentSettled"]
    assert item().command_id == item().command_id
    assert item().command_id != item(last_ms=1).command_id


def submission(state: JobState, **changes: object):  # type: ignore[no-untyped-def]
    assert state.match is not None
    provider = provider_of(state.match)
    receipt = receipt_for(state, **changes).sign(provider.signer)
    return provider.submit(hex16("job"), state.epoch, receipt)


@pytest.mark.parametrize(
    ("changes", "outcome", "reason"),
    [({}, "result_sealed", "none"), ({"price_nanoton": 1}, "result_rejected", "wrong_price")],
)
def test_a_provider_is_told_the_outcome_and_a_repeat_hears_it_again(
    changes: dict[str, object], outcome: str, reason: str
) -> None:
    state = matched_job()
    result = submission(state, **changes)
    events = decide_settle_result(state, settle_command(result))
    first = ack_for(result, events, state)
    assert (first.outcome, first.reason, first.epoch) == (outcome, reason, 1)
    again = ack_for(result, (), fold(events, state))
    assert again.outcome == outcome


def test_the_loser_of_an_expired_epoch_is_not_told_that_it_was_sealed() -> None:
    first = matched_job(providers=PROVIDERS)
    late = submission(first)
    state = fold(decide_expire_lease(first, expire_command()), first)
    state = fold(decide_settle_result(state, settle_command(late)), state)
    state = fold(decide_settle_result(state, settle_command(submission(state))), state)
    assert ack_for(late, (), state).outcome == "result_rejected"


def test_a_whole_network_projects_to_balances_that_sum_to_zero() -> None:
    network = JobNetwork()
    network.enrol(ALICE)
    network.open("acct_1", 100_000)
    network.request("job", "acct_1")
    network.submit(network.receipt(network.state("job")))
    assert sum(network.ledger_tables().balances.values()) == 0
    assert network.ledger_tables().balances["client:acct_1"] == 99_715
