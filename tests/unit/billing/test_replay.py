"""Replay's pure half: the same log gives the same bytes, and a changed decision is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocoon.contracts.envelope import StoredEvent
from services.billing.replay import MAX_ENDED_JOBS, Decisions, Derived, Report
from tests.support.job_network import JobNetwork
from tests.support.job_world import PROVIDERS


def network(jobs: int = 3) -> JobNetwork:
    made = JobNetwork()
    for provider in PROVIDERS:
        made.enrol(provider)
    made.open("acct_1", 10_000_000)
    for index in range(jobs):
        made.request(f"job{index}", "acct_1")
        if index % 3 == 1:
            late = made.receipt(made.state(f"job{index}"))
            made.expire(f"job{index}", reason="silent")
            made.submit(late)
        made.submit(made.receipt(made.state(f"job{index}")))
    return made


def derived(rows: list[StoredEvent]) -> Derived:
    made = Derived()
    made.add(rows)
    return made


def live(made: JobNetwork) -> Derived:
    tables, out = made.ledger_tables(), Derived()
    for row in tables.entries:
        out.add_entry(row)
    out.balances.update(tables.balances)
    out.settlements.update(tables.settlements)
    return out


def test_the_log_and_the_tables_have_the_same_bytes() -> None:
    made = network()
    assert derived(made.log.events).serialise() == live(made).serialise()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_size_of_the_batches_does_not_change_the_bytes(size: int) -> None:
    rows = network().log.events
    out = Derived()
    for at in range(0, len(rows), size):
        out.add(rows[at : at + size])
    assert out.serialise() == derived(rows).serialise()


def test_no_closed_hold_is_left_in_the_bytes() -> None:
    assert b"hold:" not in derived(network().log.events).serialise()


@pytest.mark.parametrize("what", ["balances", "settlements", "entries"])
def test_any_difference_changes_the_bytes(what: str) -> None:
    made = network()
    changed = live(made)
    if what == "balances":
        changed.balances["client:acct_1"] += 1
    elif what == "settlements":
        changed.settlements.popitem()
    else:
        changed.add_entry((1, 1, 9, "faucet", 1))
    assert changed.serialise() != derived(made.log.events).serialise()


def decide_again(made: JobNetwork, first: int = 1, **changed: bytes) -> Report:
    """Check every command from a position on; `changed` replaces commands' bytes."""
    report = Report(shard=1, first=first, last=len(made.log.events))
    decisions = Decisions(report)
    for command in made.log.commands.values():
        group = made.log.events[command.first_position - 1 : command.last_position]
        if not group or command.first_position < first:
            continue
        if decisions.lacks(group[0]):
            before = made.log.stream(group[0].stream)[: group[0].version - 1]
            decisions.learn(group[0].stream, before)
        decisions.check(changed.get(command.command_id, command.data), group)
    return report


def test_every_decision_is_made_again_with_the_same_bytes() -> None:
    made = network()
    report = decide_again(made)
    assert report.differences == []
    assert report.decisions == len(made.log.commands)


@pytest.mark.parametrize("first", range(2, 20))
def test_decisions_can_be_made_again_from_the_middle_of_the_log(first: int) -> None:
    assert decide_again(network(), first).differences == []


def test_a_decision_that_is_another_now_is_named_with_its_position() -> None:
    made = network(1)
    command = next(c for c in made.log.commands.values() if b'"RequestJob"' in c.data)
    poor = command.data.replace(b'"available_nanoton":"10000000"', b'"available_nanoton":"1"')
    assert poor != command.data
    report = decide_again(made, 1, **{command.command_id: poor})
    assert len(report.differences) == 1
    assert report.differences[0].startswith(f"position {command.first_position}: RequestJob")
    assert "FundsRefused" in report.differences[0]


def test_an_event_that_nobody_decided_is_found() -> None:
    made = network(1)
    last = made.log.events[-1]
    made.log.events[-1] = replace(last, data=last.data.replace(b'"fee_nanoton":"15"',
                                                               b'"fee_nanoton":"16"'))  # fmt: skip
    assert len(decide_again(made).differences) == 1


def test_forgetting_ended_jobs_forgets_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.billing.replay.MAX_ENDED_JOBS", 2)
    made = network(8)
    made.open("acct_1", 5)
    assert decide_again(made).differences == []
    assert MAX_ENDED_JOBS >= 1024


def test_the_number_of_differences_that_are_kept_is_bounded() -> None:
    report = Report(shard=1, first=1, last=1)
    for index in range(100):
        report.say(str(index))
    assert len(report.differences) == 20
