"""One door to every decider: (state of the command's stream, command) -> events.

The services call their deciders directly; `replay --decisions`, simulation and audit come here.
"""

from __future__ import annotations

from typing import TypeAlias

from cocoon.contracts import commands as c
from cocoon.contracts import events as e
from cocoon.domain import account, honesty, job, provider, seeding
from cocoon.domain.account import AccountState, decide_credit_deposit, decide_open_account
from cocoon.domain.honesty import HonestyState
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.domain.metering import decide_open_dispute
from cocoon.domain.open_tier import decide_publish_policy
from cocoon.domain.provider import (
    ProviderState,
    decide_attest_provider,
    decide_enrol_provider,
    decide_publish_bundle,
    decide_publish_offer,
    decide_publish_profile,
    decide_revoke_attestation,
)
from cocoon.domain.seeding import SeedState, decide_commit_seed, decide_reveal_seed
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import BadRequest

State: TypeAlias = JobState | AccountState | ProviderState | SeedState | HonestyState | None


def decide(state: State, command: c.Command) -> tuple[e.EventData, ...]:
    """Return the command's events. Raises BadRequest if the state is of another aggregate."""
    match state, command:
        case JobState(), c.RequestJob():
            return decide_request_job(state, command)
        case JobState(), c.ExpireLease():
            return decide_expire_lease(state, command)
        case JobState(), c.SettleResult():
            return decide_settle_result(state, command)
        case AccountState(), c.OpenAccount():
            return decide_open_account(state, command)
        case AccountState(), c.CreditDeposit():
            return decide_credit_deposit(state, command)
        case ProviderState(), c.EnrolProvider():
            return decide_enrol_provider(state, command)
        case ProviderState(), c.PublishOffer():
            return decide_publish_offer(state, command)
        case ProviderState(), c.PublishProfile():
            return decide_publish_profile(state, command)
        case SeedState(), c.CommitMatchingSeed():
            return decide_commit_seed(state, command)
        case SeedState(), c.RevealMatchingSeed():
            return decide_reveal_seed(state, command)
        case ProviderState(), c.AttestProvider():
            return decide_attest_provider(state, command)
        case ProviderState(), c.RevokeAttestation():
            return decide_revoke_attestation(state, command)
        case ProviderState(), c.PublishKeyBundle():
            return decide_publish_bundle(state, command)
        case HonestyState(), c.JudgeCanary():
            return honesty.decide_judge_canary(state, command)
        case HonestyState(), c.LiftHonesty():
            return honesty.decide_lift_honesty(state, command)
        case None, c.OpenDispute():
            return decide_open_dispute(command)
        case None, c.PublishPolicy():
            return decide_publish_policy(command)
        case None, c.TakeLedgerSnapshot():
            return (
                e.LedgerSnapshotTaken(
                    shard=command.shard, position=command.position, sha256=command.sha256
                ),
            )
        case _:
            raise BadRequest(f"{command.command_type} does not act on {type(state).__name__}")


def stream_of(command: c.Command) -> str:
    """The stream whose state the command is decided on."""
    match command:
        case c.RequestJob() | c.ExpireLease() | c.SettleResult():
            return f"job/{command.job_id}"
        case c.OpenAccount() | c.CreditDeposit():
            return f"account/{command.account_id}"
        case c.PublishPolicy():
            return "policy/network"
        case c.TakeLedgerSnapshot():
            return f"ledger/{command.shard}"
        case c.CommitMatchingSeed() | c.RevealMatchingSeed():
            return f"matching/{command.shard}"
        case c.OpenDispute():
            return f"dispute/{command.job_id}"
        case c.JudgeCanary() | c.LiftHonesty():
            return f"honesty/{command.provider_id}"
        case (
            c.EnrolProvider()
            | c.PublishOffer()
            | c.PublishProfile()
            | c.AttestProvider()
            | c.RevokeAttestation()
            | c.PublishKeyBundle()
        ):
            return f"provider/{command.provider_id}"
        case _:
            raise BadRequest(f"{command.command_type} has no stream")


def evolve(state: State, event: e.EventData, stream: str) -> State:
    """Fold an event into the state of its stream (None starts it)."""
    aggregate = stream.partition("/")[0]
    if aggregate == "job":
        return job.evolve(state if isinstance(state, JobState) else JobState(), event)
    if aggregate == "account":
        return account.evolve(state if isinstance(state, AccountState) else AccountState(), event)
    if aggregate == "provider":
        start = state if isinstance(state, ProviderState) else ProviderState()
        return provider.evolve(start, event)
    if aggregate == "matching":
        return seeding.evolve(state if isinstance(state, SeedState) else SeedState(), event)
    if aggregate == "honesty":
        return honesty.evolve(state if isinstance(state, HonestyState) else HonestyState(), event)
    return None


def initial(stream: str) -> State:
    """The state of a stream without events."""
    return _STARTS.get(stream.partition("/")[0])


_STARTS: dict[str, State] = {
    "job": JobState(), "account": AccountState(), "provider": ProviderState(),
    "matching": SeedState(),
    "honesty": HonestyState(),
}  # fmt: skip
