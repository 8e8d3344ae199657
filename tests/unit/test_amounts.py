"""Amounts in contracts: decimal digits or an int, and nothing that merely looks like one."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from cocoon.contracts.events import FundsHeld
from cocoon.kernel.money import MAX_NANOTON

JOB = "0" * 32


def held(amount: object) -> FundsHeld:
    text = json.dumps({"account_id": "a", "amount_nanoton": amount, "job_id": JOB})
    return FundsHeld.model_validate_json(text)


@pytest.mark.parametrize("amount", [0, 1, 10**18, MAX_NANOTON])
def test_digits_and_integers_are_the_same_amount(amount: int) -> None:
    assert held(amount).amount_nanoton == held(str(amount)).amount_nanoton == amount
    event = FundsHeld(job_id=JOB, account_id="a", amount_nanoton=amount)
    assert event == held(amount)
    assert json.loads(event.to_canonical())["amount_nanoton"] == str(amount)


@pytest.mark.parametrize(
    "wrong",
    [
        "", "01", "00", "+1", "-1", " 1", "1 ", "1\n", "1_0", "1.0", "1e3", "0x1", "\u0661",
        str(MAX_NANOTON + 1), "9" * 5000, -1, MAX_NANOTON + 1, 1.0, True, None, [], {},
    ],
)  # fmt: skip
def test_nothing_else_is_an_amount(wrong: object) -> None:
    with pytest.raises(ValidationError):
        held(wrong)
    with pytest.raises(ValidationError):
        FundsHeld.model_validate({"job_id": JOB, "account_id": "a", "amount_nanoton": wrong})
