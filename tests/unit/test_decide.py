"""One door leads every command to its decider; what is stored decides the same again."""

from __future__ import annotations

import pytest

from cocoon.contracts import commands as c
from cocoon.contracts import events as e
from cocoon.domain import account, provider
from cocoon.domain.decide import State, decide, evolve, initial, stream_of
from cocoon.domain.job import JobState, fold
from cocoon.domain.seeding import SeedState, commitment
from cocoon.kernel.errors import BadRequest
from tests.support.example_events import CANARY, DISPUTE
from tests.support.job_world import (
    ALICE,
    MODEL,
    POLICY,
    expire_command,
    hex16,
    hex32,
    matched_job,
    request_command,
    settle_command,
)  # fmt: skip
from tests.support.sentences import says_why

_ENROLLED, _OFFER, _ATTESTED, _BUNDLE = ALICE.network_events()


def provider_state(*events: e.EventData) -> State:
    state = initial("provider/x")
    for event in events:
        state = evolve(state, event, "provider/x")
    return state


READY = provider_state(_ENROLLED, _OFFER, _ATTESTED)
OPENED = evolve(initial("account/x"), e.AccountOpened(account_id="acct_1"), "account/acct_1")
SCENARIOS: list[tuple[State, c.Command, list[str]]] = [
    (JobState(), request_command(), ["JobRequested", "FundsHeld", "ProviderMatched"]),
    (matched_job(), expire_command(), ["LeaseExpired", "ProviderMatched"]),
    (matched_job(), settle_command(matched_job()), ["ResultSealed", "PaymentSettled"]),
    (initial("account/a"), c.OpenAccount(account_id="acct_1"), ["AccountOpened"]),
    (
        OPENED,
        c.CreditDeposit(account_id="acct_1", amount_nanoton=1, source="dev", reference="r"),
        ["DepositCredited"],
    ),
    (
        initial("provider/p"),
        c.EnrolProvider.model_validate(_ENROLLED.model_dump()),
        ["ProviderEnrolled"],
    ),
    (
        provider_state(_ENROLLED),
        c.PublishOffer.model_validate(_OFFER.model_dump()),
        ["OfferPublished"],
    ),
    (
        provider_state(_ENROLLED),
        c.AttestProvider.model_validate(_ATTESTED.model_dump()),
        ["ProviderAttested"],
    ),
    (
        READY,
        c.RevokeAttestation(provider_id=ALICE.id, evidence_id=ALICE.evidence_id, reason="r"),
        ["AttestationRevoked"],
    ),
    (
        READY,
        c.PublishKeyBundle.model_validate(_BUNDLE.model_dump()),
        ["KeyBundlePublished"],
    ),
    (
        None,
        c.PublishPolicy(policy_hash=POLICY, version=2, previous_hash=hex32("before")),
        ["PolicyPublished"],
    ),
    (
        None,
        c.TakeLedgerSnapshot(shard=1, position=7, sha256=hex32("books")),
        ["LedgerSnapshotTaken"],
    ),
    (
        provider_state(_ENROLLED),
        c.PublishProfile(
            provider_id=ALICE.id, region="eu-west",
            models=(e.ProfiledModel(model_id=MODEL, quantisation="int8"),),
        ),
        ["ProviderProfilePublished"],
    ),
    (
        initial("matching/1"),
        c.CommitMatchingSeed(shard=1, period=1, commitment=commitment(bytes(32))),
        ["MatchingSeedCommitted"],
    ),
    (
        SeedState(1, 1, ((1, commitment(bytes(32))),)),
        c.RevealMatchingSeed(shard=1, period=1, secret=bytes(32).hex()),
        ["MatchingSeedRevealed"],
    ),
    (
        initial("honesty/p"),
        c.JudgeCanary.model_validate(CANARY.model_dump()),
        ["CanaryJudged"],
    ),
    (
        evolve(initial("honesty/p"), CANARY, "honesty/p"),
        c.LiftHonesty(provider_id=ALICE.id),
        ["HonestyLifted"],
    ),
    (None, c.OpenDispute.model_validate(DISPUTE.model_dump()), ["DisputeOpened"]),
]  # fmt: skip


def test_there_is_a_scenario_for_every_command() -> None:
    tried = sorted(command.command_type for _, command, _ in SCENARIOS)
    assert tried == sorted(cls.command_type for cls in c.ALL_COMMANDS)


@pytest.mark.parametrize(
    ("state", "command", "types"), SCENARIOS, ids=[s[1].command_type for s in SCENARIOS]
)
def test_a_stored_command_decides_the_same_bytes_again(
    state: State, command: c.Command, types: list[str]
) -> None:
    first = decide(state, command)
    assert [event.event_type for event in first] == types
    again = decide(state, c.decode_command(command.to_stored()))
    assert [e.to_canonical() for e in again] == [e.to_canonical() for e in first]


@pytest.mark.parametrize(
    ("state", "command", "types"), SCENARIOS, ids=[s[1].command_type for s in SCENARIOS]
)
def test_every_command_has_a_stream_whose_start_it_can_be_decided_on_or_refused(
    state: State, command: c.Command, types: list[str]
) -> None:
    assert type(initial(stream_of(command))) is type(state)


@pytest.mark.parametrize(
    ("state", "command", "types"),
    [scenario for scenario in SCENARIOS if len(scenario[2]) == 1],
    ids=[s[1].command_type for s in SCENARIOS if len(s[2]) == 1],
)
def test_an_event_says_all_that_its_command_said(
    state: State, command: c.Command, types: list[str]
) -> None:
    (event,) = decide(state, command)
    told = event.model_dump()
    assert told == {name: value for name, value in command.model_dump().items() if name in told}


JOB_STREAM, PROVIDER_STREAM = f"job/{hex16('job')}", f"provider/{ALICE.id}"
STREAMS = {
    "RequestJob": JOB_STREAM, "ExpireLease": JOB_STREAM, "SettleResult": JOB_STREAM,
    "OpenAccount": "account/acct_1", "CreditDeposit": "account/acct_1",
    "EnrolProvider": PROVIDER_STREAM, "PublishOffer": PROVIDER_STREAM,
    "AttestProvider": PROVIDER_STREAM, "RevokeAttestation": PROVIDER_STREAM,
    "PublishKeyBundle": PROVIDER_STREAM, "PublishPolicy": "policy/network",
    "TakeLedgerSnapshot": "ledger/1", "PublishProfile": PROVIDER_STREAM,
    "CommitMatchingSeed": "matching/1", "RevealMatchingSeed": "matching/1",
    "JudgeCanary": f"honesty/{ALICE.id}",
    "LiftHonesty": f"honesty/{ALICE.id}", "OpenDispute": f"dispute/{hex16('job')}",
}  # fmt: skip


@pytest.mark.parametrize("command", [s[1] for s in SCENARIOS], ids=lambda c: c.command_type)
def test_a_command_names_the_stream_it_grows(command: c.Command) -> None:
    assert stream_of(command) == STREAMS[command.command_type]


def test_a_command_on_another_aggregate_is_refused() -> None:
    said = "OpenAccount does not act on JobState"
    with pytest.raises(BadRequest, match=said, check=says_why):
        decide(JobState(), c.OpenAccount(account_id="acct_1"))
    with pytest.raises(BadRequest, check=says_why):
        decide(OPENED, request_command())


class Unknown(c.Command):
    command_type = "Unknown"


def test_a_command_without_a_stream_is_refused() -> None:
    with pytest.raises(BadRequest, match="no stream", check=says_why):
        stream_of(Unknown())


@pytest.mark.parametrize(
    "stored", [b'{"type":"Nothing","command":{}}', b'{"type":[],"command":{}}', b"{}", b"[]", b"x"]
)
def test_stored_bytes_of_no_command_are_refused(stored: bytes) -> None:
    with pytest.raises((KeyError, ValueError)):
        c.decode_command(stored)


@pytest.mark.parametrize("name", ["account/acct_1", "account/acct_1/of/somebody"])
def test_an_account_folded_through_the_door_is_the_account(name: str) -> None:
    opened = e.AccountOpened(account_id="acct_1")
    paid = e.DepositCredited(account_id="acct_1", amount_nanoton=1, source="dev", reference="r")
    state = initial(name)
    assert state == account.AccountState()
    for event in (opened, paid):
        state = evolve(state, event, name)
    assert state == account.AccountState(opened=True, version=2)
    assert evolve(None, opened, name) == account.AccountState(opened=True, version=1)


def test_a_provider_folded_through_the_door_is_the_provider() -> None:
    wanted = provider.ProviderState()
    for event in (_ENROLLED, _OFFER, _ATTESTED, _BUNDLE):
        wanted = provider.evolve(wanted, event)
    assert provider_state(_ENROLLED, _OFFER, _ATTESTED, _BUNDLE) == wanted
    assert wanted.version == 4
    first = provider.ProviderState(enrolled=_ENROLLED, version=1)  # type: ignore[arg-type]
    assert evolve(None, _ENROLLED, "provider/x") == first


def test_a_stream_of_no_aggregate_has_no_state() -> None:
    policy = e.PolicyPublished(policy_hash=POLICY, version=1, previous_hash=None)
    assert initial("policy/network") is None
    assert evolve(None, policy, "policy/network") is None


def test_a_job_folded_through_the_door_is_the_job() -> None:
    events = decide(JobState(), request_command())
    state: State = initial("job/x")
    for event in events:
        state = evolve(state, event, "job/x")
    assert state == fold(events)
    assert evolve(None, events[0], "job/x") == fold(events[:1])
