"""Accounts open once; deposits need an account."""

from __future__ import annotations

import pytest

from cocoon.contracts.commands import CreditDeposit, OpenAccount
from cocoon.contracts.events import AccountOpened, DepositCredited
from cocoon.domain.account import (
    AccountState,
    decide_credit_deposit,
    decide_open_account,
    evolve,
)  # fmt: skip
from cocoon.kernel.errors import NotFound
from tests.support.sentences import says_why

OPEN = OpenAccount(account_id="acct_1")
CREDIT = CreditDeposit(account_id="acct_1", amount_nanoton=5, source="dev", reference="r1")


def test_an_account_opens_once() -> None:
    (event,) = decide_open_account(AccountState(), OPEN)
    assert event == AccountOpened(account_id="acct_1")
    assert decide_open_account(evolve(AccountState(), event), OPEN) == ()


def test_a_deposit_is_credited_to_an_open_account() -> None:
    (event,) = decide_credit_deposit(AccountState(opened=True, version=1), CREDIT)
    assert event == DepositCredited(
        account_id="acct_1", amount_nanoton=5, source="dev", reference="r1"
    )


def test_money_for_an_unknown_account_is_refused_with_what_to_do() -> None:
    with pytest.raises(NotFound, match=r"\./cocoon keys create", check=says_why) as refused:
        decide_credit_deposit(AccountState(), CREDIT)
    assert refused.value.code == "account_not_found"


def test_every_event_of_the_stream_raises_the_version() -> None:
    unopened = evolve(AccountState(), decide_credit_deposit(AccountState(opened=True), CREDIT)[0])
    assert unopened == AccountState(opened=False, version=1)  # money opens no account
    state = evolve(AccountState(), AccountOpened(account_id="acct_1"))
    state = evolve(state, decide_credit_deposit(state, CREDIT)[0])
    assert state == AccountState(opened=True, version=2)
