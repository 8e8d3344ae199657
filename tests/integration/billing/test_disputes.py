"""A client's dispute at a real log: once a job, by its owner, with the receipt that was signed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cocoon.contracts.messages import Reply
from cocoon.eventlog.read import stream_events
from services.billing.handlers import Operator
from tests.support.books_world import Books
from tests.support.job_world import hex16


@pytest.fixture
def operator(books: Books) -> Operator:
    return Operator(books.billing, books.pool, 1, books.ledger)


async def receipt_of(books: Books, job: str) -> str:
    async with books.pool.acquire() as conn:
        events = await stream_events(conn, 1, f"job/{hex16(job)}")
    return next(e.decode().receipt for e in events if e.type == "ResultSealed")  # type: ignore[attr-defined]


async def ask(operator: Operator, receipt: str, **changes: Any) -> Reply:
    fields = {"job_id": hex16("job1"), "account_id": "acct_1", **changes.pop("request", {})}
    dispute = {
        "kind": "output_tokens", "counted_by": "tokenizer", "own_input_tokens": 90,
        "own_output_tokens": 12, "receipt": receipt, **changes,
    }  # fmt: skip
    return await operator.answer("dispute", json.dumps({**fields, "dispute": dispute}).encode())


async def test_a_dispute_stands_beside_its_job_and_moves_no_money(
    books: Books, operator: Operator
) -> None:
    await books.jobs_end(1)
    receipt = await receipt_of(books, "job1")
    before = await operator.answer("balance", b'{"account_id":"acct_1"}')
    first = await ask(operator, receipt)
    again = await ask(operator, receipt, own_output_tokens=1)
    await books.post()
    assert first.ok
    assert again == first
    told = json.loads(first.data)
    assert (told["claimed_output_tokens"], told["own_output_tokens"]) == (50, 12)
    assert told["provider_id"].startswith("prov_")
    async with books.pool.acquire() as conn:
        events = await stream_events(conn, 1, f"dispute/{hex16('job1')}")
    assert [event.type for event in events] == ["DisputeOpened"]
    assert await operator.answer("balance", b'{"account_id":"acct_1"}') == before
    assert (await books.decide_again()).differences == []
    assert (await books.replay()).differences == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"request": {"account_id": "acct_2"}}, "job_not_found"),
        ({"request": {"job_id": hex16("nobody's")}}, "job_not_found"),
        ({"request": {"job_id": hex16("job2")}}, "wrong_receipt"),
        ({"own_output_tokens": 50}, "no_dispute"),
        ({"kind": "input_tokens", "own_input_tokens": 100}, "no_dispute"),
        ({"kind": "price"}, "bad_request"),
    ],
)
async def test_what_is_no_dispute_writes_nothing(
    books: Books, operator: Operator, changes: dict[str, Any], code: str
) -> None:
    await books.jobs_end(2)
    head = await books.head()
    reply = await ask(operator, await receipt_of(books, "job1"), **changes)
    assert reply.error is not None
    assert reply.error.code == code
    assert await books.head() == head


async def test_a_receipt_that_somebody_changed_is_refused(books: Books, operator: Operator) -> None:
    await books.jobs_end(1)
    receipt = bytearray.fromhex(await receipt_of(books, "job1"))
    receipt[200] ^= 1
    reply = await ask(operator, receipt.hex())
    assert reply.error is not None
    assert reply.error.code == "wrong_receipt"
    async with books.pool.acquire() as conn:
        assert await stream_events(conn, 1, f"dispute/{hex16('job1')}") == []
