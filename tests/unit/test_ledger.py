"""Every event's postings sum to zero, and no client, hold or provider falls below zero."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts import events as e
from cocoon.domain.ledger import (
    FAUCET,
    FEES,
    Entry,
    OutOfBounds,
    apply,
    client,
    hold,
    postings,
    provider,
)
from cocoon.kernel.money import MAX_NANOTON
from tests.support.example_events import EXAMPLES, settlement
from tests.support.job_world import hex16
from tests.support.sentences import says_why

JOB = hex16("job")
MONEY = {"FundsHeld", "PaymentSettled", "JobFailed", "JobCancelled", "DepositCredited"}


def test_there_is_an_example_of_every_event() -> None:
    assert [type(event) for event in EXAMPLES] == list(e.ALL_EVENTS)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.event_type)
def test_the_entries_of_every_event_sum_to_zero(event: e.EventData) -> None:
    entries = postings(event)
    assert sum(entry.amount_nanoton for entry in entries) == 0
    assert all(entry.amount_nanoton for entry in entries)
    assert bool(entries) == (event.event_type in MONEY)


amounts = st.integers(0, 2**62)


@given(held=amounts, price_share=st.integers(0, 10**6), fee_share=st.integers(0, 10**6))
def test_every_settlement_that_adds_up_sums_to_zero(
    held: int, price_share: int, fee_share: int
) -> None:
    paid = held * price_share // 10**6
    fee = paid * fee_share // 10**6
    entries = postings(settlement(held=held, price=paid, provider=paid - fee, fee=fee))
    assert sum(entry.amount_nanoton for entry in entries) == 0


@given(st.integers(1, 2**62), st.sampled_from(["dev", "ton"]))
def test_a_deposit_has_another_side(amount: int, source: str) -> None:
    event = e.DepositCredited(
        account_id="acct_1",
        amount_nanoton=amount,
        source=source,
        reference="r",  # type: ignore[arg-type]
    )
    other = FAUCET if source == "dev" else "escrow:acct_1"
    assert postings(event) == [Entry(client("acct_1"), amount), Entry(other, -amount)]


def test_a_settlement_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to", check=says_why):
        postings(settlement(held=100, price=60, provider=57, fee=4))


def test_a_settlement_empties_the_hold_and_pays_everybody() -> None:
    event = settlement(held=1000, price=285, provider=270, fee=15)
    assert postings(event) == [
        Entry(hold(JOB), -1000),
        Entry(provider("prov_1"), 270),
        Entry(FEES, 15),
        Entry(client("acct_1"), 715),
    ]


def test_a_free_job_pays_nobody() -> None:
    event = settlement(held=1000, price=0, provider=0, fee=0)
    assert postings(event) == [Entry(hold(JOB), -1000), Entry(client("acct_1"), 1000)]


def test_a_hold_moves_the_client_s_money_aside_and_a_release_gives_it_back() -> None:
    held = e.FundsHeld(job_id=JOB, account_id="acct_1", amount_nanoton=1000)
    assert postings(held) == [Entry("client:acct_1", -1000), Entry(f"hold:{JOB}", 1000)]
    for end in (
        e.JobFailed(job_id=JOB, account_id="acct_1", reason="r", released_nanoton=1000),
        e.JobCancelled(job_id=JOB, account_id="acct_1", released_nanoton=1000),
    ):
        assert postings(end) == [Entry(f"hold:{JOB}", -1000), Entry("client:acct_1", 1000)]


@pytest.mark.parametrize("account", [client("a"), hold("j"), provider("p"), FEES])
def test_these_balances_never_fall_below_zero(account: str) -> None:
    assert apply({account: 5}, [Entry(account, -5)]) == {account: 0}
    with pytest.raises(OutOfBounds, match=f"^{account} would fall below zero$") as refused:
        apply({account: 5}, [Entry(account, -6)])
    assert refused.value.reason == "negative_balance"


def test_every_account_of_a_posting_is_looked_at_not_the_first_alone() -> None:
    good, bad = Entry(client("a"), 5), Entry(client("b"), -1)
    for entries in ([good, bad], [bad, good], [good, good, bad]):
        with pytest.raises(OutOfBounds, match=r"^client:b would"):
            apply({}, entries)


@pytest.mark.parametrize(("account", "sign"), [(client("a"), 1), (FAUCET, 1), (FAUCET, -1)])
def test_no_balance_leaves_the_range_of_nanoton(account: str, sign: int) -> None:
    most = sign * MAX_NANOTON
    assert apply({account: most - sign}, [Entry(account, sign)]) == {account: most}
    with pytest.raises(OutOfBounds, match=f"^{account} would pass 2..63-1 nanoTON$") as refused:
        apply({account: most}, [Entry(account, sign)])
    assert refused.value.reason == "balance_overflow"


@pytest.mark.parametrize("account", [FAUCET, "escrow:a"])
def test_the_outside_world_may_owe(account: str) -> None:
    assert apply({}, [Entry(account, -6)]) == {account: -6}


def test_only_what_changed_is_returned_and_entries_of_one_account_add_up() -> None:
    balances = {client("a"): 10, client("b"): 1}
    changed = apply(balances, [Entry(client("a"), -4), Entry(client("a"), -6)])
    assert changed == {client("a"): 0}
    assert balances == {client("a"): 10, client("b"): 1}
