"""Replay's pure half: the same log gives the same bytes, and a changed decision is named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from cocoon.contracts.envelope import StoredEvent
from cocoon.domain.ledger import OutOfBounds, postings
from cocoon.kernel.errors import LogCorrupt
from services.billing.books import Books
from services.billing.draws import Draws
from services.billing.redecide import MAX_ENDED_JOBS, Decisions, Report
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


def folded(rows: Iterable[StoredEvent], books: Books | None = None) -> tuple[Books, str]:
    """The books after these rows, and the lines that they wrote."""
    books, lines = books or Books(), ""
    for row in rows:
        event = row.decode()
        lines += books.post(row.position, event, postings(event))
    return books, lines


def test_the_books_hold_the_tables_balances() -> None:
    made = network()
    books, lines = folded(made.log.events)
    tables = made.ledger_tables()
    assert books.balances == tables.balances
    assert len(lines.splitlines()) == len(tables.entries) + len(tables.settlements)


def test_the_lines_read_back_have_the_digest_of_the_fold() -> None:
    books, lines = folded(network().log.events)
    read = Books(balances=books.balances)
    read.read(lines)
    assert read.serialise() == books.serialise()


@pytest.mark.parametrize("at", range(20))
def test_a_fold_goes_on_from_a_snapshot_with_the_same_bytes(at: int) -> None:
    rows = network().log.events
    half, _ = folded(rows[:at])
    whole, _ = folded(rows[at:], Books.parse(half.serialise()))
    assert whole.serialise() == folded(rows)[0].serialise()


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"x",
        b"lines 0 00\n",
        b"lines 0 0\n",
        b"lines 1 00\n ",
        b"balance a\nlines 0 00",
        b"balance a 01\nlines 0 00\n",
    ],
)
def test_other_bytes_are_no_books(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"[a-z]"):
        Books.parse(wrong)


def test_no_closed_hold_is_left_in_the_bytes() -> None:
    assert b"hold:" not in folded(network().log.events)[0].serialise()


@pytest.mark.parametrize("what", ["balances", "entries", "a payment", "order"])
def test_any_difference_changes_the_bytes(what: str) -> None:
    books, lines = folded(network().log.events)
    changed = Books(balances=dict(books.balances))
    if what == "balances":
        changed.balances["client:acct_1"] += 1
    elif what == "entries":
        lines += "99 0 faucet 1\n"
    elif what == "a payment":
        lines = lines.replace(" 15\n", " 16\n", 1)
    else:
        lines = "".join(reversed(lines.splitlines(keepends=True)))
    changed.read(lines)
    assert changed.serialise() != books.serialise()


def test_an_overdraft_changes_nothing_unless_it_is_posted_unbounded() -> None:
    row = next(r for r in network(1).log.events if r.type == "FundsHeld")
    books, event = Books(), row.decode()
    with pytest.raises(OutOfBounds):
        books.post(row.position, event, postings(event))
    assert books.serialise() == Books().serialise()
    books.post(row.position, event, postings(event), bounded=False)
    assert min(books.balances.values()) < 0


def decide_again(made: JobNetwork, first: int = 1, **changed: bytes) -> Report:
    """Check every command from a position on; `changed` replaces commands' bytes."""
    report = Report(shard=1, first=first, last=len(made.log.events))
    decisions = Decisions(report, Draws(made.log.stream("matching/1")))
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


def test_a_command_that_does_not_decode_is_a_corrupt_log() -> None:
    made = network(1)
    command = next(iter(made.log.commands.values()))
    for data in (b"", b"[]", b"{}", b'{"command":{},"type":"Nothing"}', b'{"command":1,"type":[]}'):
        with pytest.raises(LogCorrupt, match="position 1"):
            decide_again(made, 1, **{command.command_id: data})


def test_an_event_that_nobody_decided_is_found() -> None:
    made = network(1)
    last = made.log.events[-1]
    made.log.events[-1] = replace(last, data=last.data.replace(b'"fee_nanoton":"15"',
                                                               b'"fee_nanoton":"16"'))  # fmt: skip
    assert len(decide_again(made).differences) == 1


def test_a_decision_written_into_another_stream_is_found() -> None:
    made = network(1)
    made.log.events[-1] = replace(made.log.events[-1], stream="account/acct_1")
    assert len(decide_again(made).differences) == 1


def test_forgetting_ended_jobs_forgets_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.billing.redecide.MAX_ENDED_JOBS", 2)
    made = network(8)
    made.open("acct_1", 5)
    assert decide_again(made).differences == []
    assert MAX_ENDED_JOBS >= 1024


def test_the_number_of_differences_that_are_kept_is_bounded() -> None:
    report = Report(shard=1, first=1, last=1)
    for index in range(100):
        report.say(str(index))
    assert len(report.differences) == 20
