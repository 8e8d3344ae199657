"""Nothing is violated where nothing was done wrong; each invariant finds what is planted for it."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from cocoon.contracts import events as e
from cocoon.contracts.envelope import AppendItem, NewEvent, StoredEvent
from cocoon.contracts.events import EventData
from cocoon.eventlog.read import StoredCommand
from cocoon.kernel import canonical
from tests.invariants import INVARIANTS, check_all
from tests.support.canaries import files_under, find_canaries
from tests.support.collected import ClientCall, Evidence, LedgerTables
from tests.support.example_events import put, settlement
from tests.support.job_network import JobNetwork, stream_of
from tests.support.job_world import ALICE, PROVIDERS, hex16, hex32
from tests.support.model_log import ModelLog

SETTLED, LOST, CANCELLED, POOR = hex16("settled"), hex16("lost"), hex16("cancelled"), hex16("poor")


def good_network() -> JobNetwork:
    network = JobNetwork()
    for provider in PROVIDERS:
        network.enrol(provider)
    network.open("acct_1", 100_000)
    network.open("acct_2", 5_000)
    network.request("settled", "acct_1")
    network.submit(network.receipt(network.state("settled")))
    network.request("lost", "acct_1")
    late = network.receipt(network.state("lost"))
    network.expire("lost", reason="silent")
    network.submit(late)
    network.submit(network.receipt(network.state("lost")))
    network.request("cancelled", "acct_1")
    network.expire("cancelled", cancelled=True)
    network.request("poor", "acct_2")
    return network


def good() -> Evidence:
    evidence = good_network().evidence(quiet=True)
    calls = [
        ClientCall("acct_1", "k1", SETTLED, 200, 2048, hex32("answer"), 1),
        ClientCall("acct_1", "k1", SETTLED, 200, 2048, hex32("answer"), 1),
        ClientCall("acct_1", "k2", LOST, 200, 2048, hex32("other answer"), 2),
        ClientCall("acct_2", "k1", POOR, 402, 0),
    ]
    return replace(evidence, calls=calls, canaries_found=[], chain_payouts={})


def rewritten(
    change: Callable[[list[tuple[str, EventData, StoredEvent]]], None], **known: object
) -> Evidence:
    """The good log with its events changed, chained again as if it had been written so."""
    evidence = good()
    rows = [(row.stream, row.decode(), row) for row in evidence.logs[1]]
    change(rows)
    log = ModelLog(1)
    commands: dict[str, list[NewEvent]] = {}
    for stream, event, row in rows:
        commands.setdefault(row.causation_id, []).append(NewEvent(stream, event))
    for command_id, events in commands.items():
        log.append(AppendItem(command_id, b"{}", "test", "c", (), tuple(events)))
    logs = {0: evidence.logs[0], 1: tuple(log.events)}
    return replace(
        evidence,
        logs=logs,
        streams={1: stream_of(1, log.events)},
        ledgers=None,
        commands=None,
        **known,  # type: ignore[arg-type]
    )


def swap(event_type: str, job: str = SETTLED, /, **update: object) -> Evidence:
    """The good log with fields of one event changed."""

    def change(rows: list[tuple[str, EventData, StoredEvent]]) -> None:
        index = next(
            i for i, (stream, event, _) in enumerate(rows)
            if event.event_type == event_type and stream in (f"job/{job}", "account/acct_1")
        )  # fmt: skip
        stream, event, row = rows[index]
        rows[index] = (stream, event.model_copy(update=update), row)

    return rewritten(change)


def drop(*types: str, job: str = SETTLED) -> Evidence:
    def change(rows: list[tuple[str, EventData, StoredEvent]]) -> None:
        rows[:] = [r for r in rows if r[0] != f"job/{job}" or r[1].event_type not in types]

    return rewritten(change)


def add(*events: EventData, stream: str = f"job/{SETTLED}") -> Evidence:
    def change(rows: list[tuple[str, EventData, StoredEvent]]) -> None:
        more = replace(rows[-1][2], causation_id="planted")
        rows.extend((stream, event, more) for event in events)

    return rewritten(change)


def event_of(event_type: str, job: str = SETTLED) -> EventData:
    rows = good().logs[1]
    return next(r.decode() for r in rows if r.stream == f"job/{job}" and r.type == event_type)


def row_changed(index: int, **fields: object) -> Evidence:
    evidence = good()
    rows = list(evidence.logs[1])
    rows[index] = replace(rows[index], **fields)  # type: ignore[arg-type]
    return replace(evidence, logs={**evidence.logs, 1: rows})


def tables(change: Callable[[LedgerTables], LedgerTables]) -> Evidence:
    evidence = good()
    assert evidence.ledgers is not None
    return replace(evidence, ledgers={1: change(evidence.ledgers[1])})


def message_changed(index: int, **fields: object) -> Evidence:
    evidence = good()
    assert evidence.streams is not None
    messages = list(evidence.streams[1])
    messages[index] = replace(messages[index], **fields)  # type: ignore[arg-type]
    return replace(evidence, streams={1: messages})


def messages(change: Callable[[list], Iterable]) -> Evidence:  # type: ignore[type-arg]
    evidence = good()
    assert evidence.streams is not None
    return replace(evidence, streams={1: list(change(list(evidence.streams[1])))})


def calls(*more: ClientCall) -> Evidence:
    evidence = good()
    return replace(evidence, calls=[*(evidence.calls or ()), *more])


def late_match_after_revocation() -> Evidence:
    network = good_network()
    now_us = [network.log.events[-1].recorded_at_us]
    network.log.now_us = network.network.now_us = lambda: now_us[0]
    for provider in PROVIDERS:
        revoked = e.AttestationRevoked(
            provider_id=provider.id, evidence_id=provider.evidence_id, reason="ban"
        )
        put(network.network, f"provider/{provider.id}", [revoked])
    now_us[0] += 6_000_000
    network.request("revoked", "acct_1")
    return network.evidence()


def payout(amount: int, chain: dict[str, int], times: int = 1) -> Evidence:
    evidence = good()
    data = canonical.dumps({"payout_id": "p1", "amount_nanoton": str(amount)})
    row = replace(evidence.logs[0][-1], type="PayoutConfirmed", data=data)
    return Evidence(logs={0: [row] * times}, chain_payouts=chain)


def wrong_command() -> Evidence:
    evidence = good()
    assert evidence.commands is not None
    commands = list(evidence.commands[1])
    index = next(i for i, c in enumerate(commands) if b'"RequestJob"' in c.data)
    bigger = commands[index].data.replace(b'"max_input_tokens":1000', b'"max_input_tokens":999')
    commands[index] = replace(commands[index], data=bigger)
    return replace(evidence, commands={1: commands})


def lost_balance(have: LedgerTables) -> LedgerTables:
    moved = {a: n - 1 if a == "client:acct_1" else n for a, n in have.balances.items()}
    moved["faucet"] += 1
    return replace(have, balances=moved)


HELD = e.FundsHeld(job_id=SETTLED, account_id="acct_1", amount_nanoton=10_000)
PLANTED: list[tuple[int, str, Callable[[], Evidence]]] = [
    (1, "a job that never ends", lambda: drop("ResultSealed", "PaymentSettled")),
    (1, "two ends", lambda: add(event_of("PaymentSettled"))),
    (1, "a match after the end", lambda: add(event_of("ProviderMatched"))),
    (2, "a hole", lambda: replace(good(), logs={1: good().logs[1][1:]})),
    (2, "a changed byte", lambda: row_changed(3, data=b"{}")),
    (2, "a jump of versions", lambda: row_changed(3, version=7)),
    (2, "time that steps back", lambda: row_changed(3, recorded_at_us=1)),
    (2, "another actor", lambda: row_changed(3, actor="mallory")),
    (3, "another body", lambda: message_changed(2, body=b"{}")),
    (3, "another header", lambda: message_changed(2, headers={"ce-id": "x"})),
    (3, "another subject", lambda: message_changed(2, subject="evt.1.job.x.job_failed")),
    (3, "a gap", lambda: messages(lambda all_: all_[:3] + all_[4:])),
    (3, "a duplicate", lambda: messages(lambda all_: [*all_[:3], all_[2], *all_[3:]])),
    (3, "a stream ahead", lambda: messages(
        lambda all_: [*all_, replace(all_[-1], sequence=len(all_) + 1)])),
    (3, "a stream that stays behind", lambda: messages(lambda all_: all_[:-1])),
    (4, "a settlement that creates money", lambda: swap("PaymentSettled", fee_nanoton=16)),
    (4, "balances that do not sum up", lambda: tables(
        lambda have: replace(have, balances={**have.balances, "faucet": 1}))),
    (4, "half a posting", lambda: tables(lambda have: replace(have, entries=have.entries[1:]))),
    (5, "a release of more than the hold", lambda: swap(
        "JobCancelled", CANCELLED, released_nanoton=10_001)),
    (5, "a hold that is never returned", lambda: swap(
        "JobCancelled", CANCELLED, released_nanoton=9_999)),
    (6, "two charges", lambda: add(HELD, event_of("PaymentSettled"))),
    (6, "a charge without a result", lambda: drop("ResultSealed")),
    (6, "a charge above the hold", lambda: swap("FundsHeld", amount_nanoton=100)),
    (6, "a forged receipt", lambda: swap("ResultSealed", receipt="00" * 420)),
    (6, "another price than the receipt's", lambda: swap(
        "PaymentSettled", price_nanoton=286, provider_nanoton=271, released_nanoton=9_714)),
    (6, "the receipt of another job", lambda: swap(
        "ResultSealed", receipt=event_of("ResultSealed", LOST).receipt)),  # type: ignore[attr-defined]
    (7, "a result that was not paid", lambda: drop("PaymentSettled")),
    (7, "a payment to somebody else", lambda: swap("PaymentSettled", provider_id="prov_x")),
    (7, "a payment of a stale epoch", lambda: swap("PaymentSettled", LOST, epoch=1)),
    (7, "a share that is not the quote's", lambda: swap(
        "PaymentSettled", provider_nanoton=271, fee_nanoton=14)),
    (7, "a match of another attestation", lambda: swap("ProviderMatched", attested_position=1)),
    (7, "a match of no attestation", lambda: swap("ProviderMatched", attested_position=99)),
    (7, "a match long after the revocation", late_match_after_revocation),
    (8, "a hold of money that is not there", lambda: swap("FundsHeld", amount_nanoton=999_999)),
    (8, "a negative balance in the table", lambda: tables(
        lambda have: replace(have, balances={"client:x": -1, "faucet": 1}))),
    (9, "two leases at once", lambda: drop("LeaseExpired", job=LOST)),
    (9, "an epoch twice", lambda: swap("ProviderMatched", LOST, epoch=2)),
    (9, "an expiry of another epoch", lambda: swap("LeaseExpired", LOST, epoch=2)),
    (9, "an end under a live lease", lambda: drop("LeaseExpired", job=CANCELLED)),
    (10, "another job for the same key", lambda: calls(
        ClientCall("acct_1", "k1", LOST, 200, 2048, None, 2))),
    (10, "other bytes for the same job", lambda: calls(
        ClientCall("acct_1", "k1", SETTLED, 200, 2048, hex32("changed"), 1))),
    (10, "two jobs of one command", lambda: add(
        event_of("JobRequested"), event_of("JobRequested", LOST))),
    (11, "a unit lost in the tables", lambda: tables(lost_balance)),
    (11, "a settlement that is not there", lambda: tables(
        lambda have: replace(have, settlements={}))),
    (11, "a decision that would be another today", wrong_command),
    (12, "an answer without a job", lambda: calls(
        ClientCall("acct_1", "k9", hex16("nowhere"), 202, 0))),
    (12, "bytes of an epoch that was not committed", lambda: calls(
        ClientCall("acct_1", "k1", SETTLED, 200, 1, None, 2))),
    (13, "an event twice", lambda: replace(
        good(), logs={1: [*good().logs[1], good().logs[1][-1]]}, ledgers=None, commands=None)),
    (13, "an id that its cause does not give", lambda: row_changed(3, event_id=hex16("drawn"))),
    (13, "a line posted twice", lambda: tables(
        lambda have: replace(have, entries=[*have.entries, have.entries[-1]]))),
    (14, "a canary", lambda: replace(good(), canaries_found=["jetstream/1.blk"])),
    (15, "a payout that the log does not know", lambda: payout(5, {"p1": 5, "p2": 1})),
    (15, "a payout that never reached the chain", lambda: payout(5, {})),
    (15, "another amount", lambda: payout(5, {"p1": 6})),
    (15, "a payout confirmed twice", lambda: payout(5, {"p1": 5}, times=2)),
    (16, "an unknown type", lambda: row_changed(3, type="JobImagined")),
    (16, "an unknown version", lambda: row_changed(3, schema_version=99)),
    (16, "bytes that are not canonical", lambda: row_changed(
        3, data=good().logs[1][3].data.replace(b'":', b'": '))),
    (16, "a message that is no event", lambda: message_changed(2, headers={})),
    (16, "a command of no known type", lambda: replace(good(), commands={
        1: [StoredCommand("c", 1, 0, b'{"command":{},"type":"Wish"}')]})),
]  # fmt: skip


def test_a_network_that_did_nothing_wrong_violates_nothing() -> None:
    types = {row.type for row in good().logs[1]}
    assert {"PaymentSettled", "LeaseExpired", "JobCancelled", "FundsRefused", "ResultRejected"} <= (
        types
    )
    assert check_all(good()) == []


@pytest.mark.parametrize(
    ("number", "plant"),
    [pytest.param(number, plant, id=f"{number}-{name}") for number, name, plant in PLANTED],
)
def test_a_planted_violation_is_found(number: int, plant: Callable[[], Evidence]) -> None:
    found = INVARIANTS[number - 1](plant())
    assert found
    assert f"{number} {INVARIANTS[number - 1].__name__}: {found[0]}" in check_all(plant())


def test_there_are_sixteen_and_a_violation_is_planted_for_each() -> None:
    assert len(INVARIANTS) == 16
    assert {number for number, _, _ in PLANTED} == set(range(1, 17))
    for number, checker in enumerate(INVARIANTS, start=1):
        assert (checker.__doc__ or "").startswith(f"{number}. ")


def test_a_running_network_may_have_jobs_that_have_not_ended() -> None:
    network = good_network()
    network.request("running", "acct_1")
    assert check_all(network.evidence()) == []
    assert any("stuck" in text for text in check_all(network.evidence(quiet=True)))


def test_an_unbalanced_settlement_is_reported_and_breaks_no_other_checker() -> None:
    log = ModelLog(1)
    put(log, f"job/{hex16('job')}", [settlement(held=10, price=5, provider=5, fee=1)])
    assert any(text.startswith("4 ") for text in check_all(Evidence(logs={1: log.events})))


CANARY = b"canary-7f3a9b2c51"


@pytest.mark.parametrize(
    "data",
    [
        CANARY,
        b"..." + CANARY + b"...",
        CANARY.hex().encode(),
        CANARY.decode().encode("utf-16-le"),
        *(base64.b64encode(b"x" * n + CANARY + b"yz") for n in range(6)),
        *(base64.urlsafe_b64encode(b"\xff" * n + CANARY + b"\xff\xff") for n in range(3)),
        gzip.compress(b"log " + CANARY),
    ],
)
def test_a_canary_is_found_in_every_coat(data: bytes) -> None:
    assert find_canaries([("clean", b"nothing"), ("dirty", data)], [CANARY]) == ["dirty"]


def test_a_canary_is_found_in_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.log").write_bytes(b"x" + CANARY)
    (tmp_path / "b.log").write_bytes(b"x")
    found = find_canaries(files_under(tmp_path), [CANARY])
    assert found == [str(tmp_path / "deep" / "a.log")]


def test_a_canary_that_could_be_found_by_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="chance"):
        find_canaries([], [b"short"])


def test_the_providers_of_the_good_network_are_attested() -> None:
    assert good().logs[0][2].type == "ProviderAttested"
    assert good().logs[0][2].stream == f"provider/{ALICE.id}"
