"""Bugs put into the product, one at a time: the simulator finds each, by the named invariant.

Each is a patch of a product's function. The bounds say how many histories of how many steps it may
take; a bug that needs more would not be found in CI.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import count
from typing import Any
from unittest import mock

import pytest
from msgspec import structs

from cocoon.contracts import events as e
from cocoon.contracts.envelope import AppendItem, StoredEvent
from cocoon.domain import leasing, ledger, matching, pricing, settling
from cocoon.domain.job import JobState, JobStatus
from services.billing import decide as billing
from services.billing import results
from services.billing.draws import Draws
from services.gateway.decide import Relay
from services.matcher import decide as matcher_decide
from services.matcher import leases as matcher_leases
from services.matcher.memory import Memory
from tests.sim.history import Outcome, run_history
from tests.support.model_log import ModelLog

HISTORIES, STEPS = 24, 3_000
Plant = Callable[[], AbstractContextManager[Any]]


def nothing(*_: object, **__: object) -> None:
    """In the place of what a bug leaves out."""


@contextmanager
def all_of(*patches: Any) -> Iterator[None]:
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def a_stale_epoch_is_paid() -> AbstractContextManager[Any]:
    """Billing does not ask whether the epoch of a receipt is the live one."""
    fault_of = settling._settlement_fault

    def fault(state: JobState, command: Any) -> str | None:
        live = state.status is JobStatus.MATCHED
        if live and state.epoch != command.epoch:
            return None
        return fault_of(state, command)

    return mock.patch.object(settling, "_settlement_fault", fault)


def a_result_is_settled_twice() -> AbstractContextManager[Any]:
    """Billing forgets what it settled, and every attempt is a new command without a fence."""
    decide, item_of = settling.decide_settle_result, billing.settle_item
    numbers = itertools.count()

    def again(state: JobState, command: Any) -> Any:
        if state.status is JobStatus.SETTLED:
            held = state.request.max_price_nanoton
            state = structs.replace(state, status=JobStatus.MATCHED, result=None, held_nanoton=held)
        return decide(state, command)

    def item(command: Any, state: JobState, events: Any, traceparent: str) -> AppendItem:
        made = item_of(command, state, events, traceparent)
        return replace(made, command_id=f"settle-{next(numbers)}", expects=())

    return all_of(
        mock.patch.object(results, "decide_settle_result", again),
        mock.patch.object(billing, "settle_item", item),
    )


def a_hold_is_lost() -> AbstractContextManager[Any]:
    """A failed job gives nothing back: its hold stays for ever."""
    made = leasing.JobFailed

    def failed(**fields: Any) -> e.JobFailed:
        return made(**{**fields, "released_nanoton": 0})

    return mock.patch.object(leasing, "JobFailed", failed)


def balances_are_not_reserved() -> AbstractContextManager[Any]:
    """Holds on their way to the log are not subtracted: two requests spend the same money."""
    return mock.patch.object(Memory, "reserve", nothing)


def an_old_owner_still_writes() -> AbstractContextManager[Any]:
    """The log takes any term, and matchers do not depend on the job's version.

    Its seeds, of a period that is over, would give it away first: nobody looks at them here.
    """
    append, expire, numbers = ModelLog.append, matcher_decide.expire_item, count()

    def unfenced(self: ModelLog, item: AppendItem, role: str = "", term: int = 0) -> Any:
        return append(self, item)

    def anyhow(*arguments: Any) -> AppendItem:
        made = expire(*arguments)
        return replace(made, command_id=f"{made.command_id}-{next(numbers)}", expects=())

    return all_of(
        mock.patch.object(ModelLog, "append", unfenced),
        mock.patch.object(matcher_decide, "expire_item", anyhow),
        mock.patch.object(Draws, "check", return_value=None),
    )


def bytes_go_out_before_the_commit() -> AbstractContextManager[Any]:
    """The gateway believes an announced match."""
    adopt = Relay._adopt

    def believing(self: Relay, match: Any, now_ms: int) -> Any:
        actions = adopt(self, match, now_ms)
        self._committed_epoch = match.epoch
        return actions

    return mock.patch.object(Relay, "_adopt", believing)


def a_repeated_command_is_written_again() -> AbstractContextManager[Any]:
    """The log neither knows a command id again nor checks a stream's version."""

    def append(self: ModelLog, item: AppendItem, role: str = "", term: int = 0) -> Any:
        self.commands.pop(item.command_id, None)
        unfenced = replace(item, expects=())
        return _append(self, unfenced, role, term)

    _append = ModelLog.append
    return mock.patch.object(ModelLog, "append", append)


def a_unit_of_the_price_is_lost() -> AbstractContextManager[Any]:
    """The provider's share and the fee no longer make the price."""
    split = pricing.split

    def lossy(price_nanoton: int, fee_bps: int) -> Any:
        parts = split(price_nanoton, fee_bps)
        return replace(parts, fee=parts.fee - 1) if parts.fee else parts

    return mock.patch.object(pricing, "split", lossy)


def a_forged_receipt_is_paid() -> AbstractContextManager[Any]:
    """Billing reads receipts without checking their signature, price or names."""

    def fault(state: JobState, command: Any) -> str | None:
        live = state.status is JobStatus.MATCHED and state.epoch == command.epoch
        return None if live else "stale_epoch"

    return mock.patch.object(settling, "_settlement_fault", fault)


def a_lease_never_ends() -> AbstractContextManager[Any]:
    """A provider that is gone keeps its jobs."""
    return mock.patch.object(matcher_leases.Leases, "end", nothing)


def epochs_do_not_rise() -> AbstractContextManager[Any]:
    """A second match has the first one's epoch."""
    matched = leasing._matched

    def first(job_id: str, epoch: int, lease_ttl_ms: int, chosen: Any) -> e.ProviderMatched:
        return matched(job_id, 1, lease_ttl_ms, chosen)

    return mock.patch.object(leasing, "_matched", first)


def a_revoked_provider_is_matched() -> AbstractContextManager[Any]:
    """The matcher does not hear of revocations."""
    apply = Memory.apply_network

    def deaf(self: Memory, stored: StoredEvent) -> e.EventData:
        event = stored.decode()
        return event if isinstance(event, e.AttestationRevoked) else apply(self, stored)

    return mock.patch.object(Memory, "apply_network", deaf)


def decisions_depend_on_the_hour() -> AbstractContextManager[Any]:
    """The matcher's choice looks at something that its command does not hold."""
    choose, numbers = matching.choose, itertools.count()

    def moody(candidates: Sequence[Any], need: Any, _: str, policy: Any = None) -> Any:
        return choose(candidates, need, f"{next(numbers):064x}", policy)

    return mock.patch.object(matching, "choose", moody)


def an_event_is_posted_wrongly() -> AbstractContextManager[Any]:
    """A settlement forgets what it releases to the client."""
    settle = ledger._settle

    def short(event: e.PaymentSettled) -> list[ledger.Entry]:
        return settle(event)[:-1]

    return mock.patch.dict(ledger._POSTINGS, {e.PaymentSettled: short})


def a_hold_on_its_way_is_never_let_go() -> AbstractContextManager[Any]:
    """The matcher's memory keeps what the log has taken over: money that nobody can spend."""
    return mock.patch.object(Memory, "release_pending", nothing)


PLANTED: tuple[tuple[Plant, str], ...] = (
    (a_stale_epoch_is_paid, "7 "),
    (a_result_is_settled_twice, "1 "),
    (a_hold_is_lost, "5 "),
    (balances_are_not_reserved, "8 "),
    (an_old_owner_still_writes, "1 "),
    (bytes_go_out_before_the_commit, "12 "),
    (a_repeated_command_is_written_again, "13 "),
    (a_unit_of_the_price_is_lost, "4 "),
    (a_forged_receipt_is_paid, "6 "),
    (a_lease_never_ends, "1 "),
    (epochs_do_not_rise, "9 "),
    (a_revoked_provider_is_matched, "7 "),
    (decisions_depend_on_the_hour, "11 "),
    (an_event_is_posted_wrongly, "4 "),
    (a_hold_on_its_way_is_never_let_go, "leak: "),
)


def first_violation(histories: int = HISTORIES) -> Outcome | None:
    for seed in range(1, histories + 1):
        outcome = run_history(seed, STEPS)
        if outcome.violations:
            return outcome
    return None


@pytest.mark.parametrize(("plant", "number"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_bug_is_found(plant: Plant, number: str) -> None:
    with plant():
        outcome = first_violation()
    assert outcome is not None, "the bug was not found"
    print(f"seed {outcome.seed}, step {outcome.at_step}: {outcome.violations[:3]}")
    assert any(said.startswith(number) for said in outcome.violations)
