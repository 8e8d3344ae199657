"""A client's account: opened once, credited once per deposit's reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cocoon.contracts.commands import CreditDeposit, OpenAccount
from cocoon.contracts.events import AccountOpened, DepositCredited, EventData
from cocoon.kernel.errors import NotFound


@dataclass(frozen=True, slots=True)
class AccountState:
    opened: bool = False
    version: int = 0


def evolve(state: AccountState, event: EventData) -> AccountState:
    state = replace(state, version=state.version + 1)
    return replace(state, opened=True) if isinstance(event, AccountOpened) else state


def decide_open_account(state: AccountState, command: OpenAccount) -> tuple[EventData, ...]:
    """Open the account; a repeat changes nothing."""
    return () if state.opened else (AccountOpened(account_id=command.account_id),)


def decide_credit_deposit(state: AccountState, command: CreditDeposit) -> tuple[EventData, ...]:
    """Credit a deposit. One credit per reference: its command id is derived from the reference.

    Raises NotFound for an account that was never opened.
    """
    if not state.opened:
        raise NotFound(
            f"there is no account {command.account_id}; make one with `./cocoon keys create`",
            code="account_not_found",
        )
    return (
        DepositCredited(
            account_id=command.account_id,
            amount_nanoton=command.amount_nanoton,
            source=command.source,
            reference=command.reference,
        ),
    )
