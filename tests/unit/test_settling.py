"""A result is paid if and only if its receipt is right in everything, for the live epoch."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from nacl.signing import SigningKey

from cocoon.contracts.events import PaymentSettled, ResultRejected, ResultSealed
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_expire_lease
from cocoon.domain.ledger import postings
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import BadRequest
from cocoon.sealing.receipt import Status
from tests.support.job_world import (
    ALICE,
    BOB,
    NOW_MS,
    Provider,
    bytes32,
    expire_command,
    matched_job,
    provider_of,
    settle_command,
)  # fmt: skip
from tests.support.sentences import says_why


def rejected_reason(state: JobState, **changes: object) -> str:
    events = decide_settle_result(state, settle_command(state, **changes))  # type: ignore[arg-type]
    assert len(events) == 1
    assert isinstance(events[0], ResultRejected)
    assert postings(events[0]) == []
    return events[0].reason


def test_a_right_receipt_is_sealed_and_paid_at_once() -> None:
    state = matched_job()
    assert state.match is not None
    command = settle_command(state)
    sealed, paid = decide_settle_result(state, command)
    assert isinstance(sealed, ResultSealed)
    assert isinstance(paid, PaymentSettled)
    assert (sealed.receipt, sealed.status, sealed.response_bytes) == (
        command.receipt, "complete", 2048,
    )  # fmt: skip
    assert (sealed.input_tokens, sealed.output_tokens) == (100, 50)
    assert (paid.held_nanoton, paid.price_nanoton, paid.released_nanoton) == (10_000, 285, 9_715)
    assert (paid.provider_nanoton, paid.fee_nanoton) == (270, 15)
    assert (paid.provider_id, paid.account_id) == (state.match.provider_id, "acct_1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"job_id": bytes(16)}, "wrong_job"),
        ({"receipt_epoch": 2}, "wrong_epoch"),
        ({"key_id": bytes(16)}, "wrong_key"),
        ({"model_id": bytes32("another model")}, "wrong_model"),
        ({"quote_id": bytes32("another quote")}, "wrong_quote"),
        ({"req_hash": bytes32("another request")}, "wrong_request"),
        ({"evidence_id": bytes32("another evidence")}, "wrong_evidence"),
        ({"input_tokens": 1001}, "too_many_input_tokens"),
        ({"output_tokens": 1001}, "too_many_output_tokens"),
        ({"cached_input_tokens": 101}, "bad_counts"),
        ({"reasoning_tokens": 51}, "bad_counts"),
        ({"price_nanoton": 284}, "wrong_price"),
        ({"price_nanoton": 286}, "wrong_price"),
        ({"price_nanoton": 0}, "wrong_price"),
        ({"output_tokens": 51}, "wrong_price"),
        ({"status": Status.FAILED}, "wrong_price"),
        ({"signer": SigningKey(bytes32("stranger"))}, "receipt_sig"),
        ({"signer": ALICE.identity}, "receipt_sig"),
    ],
)
def test_a_receipt_that_is_wrong_in_one_thing_is_refused_and_unpaid(
    changes: dict[str, object], reason: str
) -> None:
    state = matched_job(providers=(ALICE,))
    assert rejected_reason(state, **changes) == reason


@pytest.mark.parametrize("at", [0, 4, 5, 6, 7, 100, 355, 356, 419])
def test_a_receipt_with_one_flipped_bit_is_refused(at: int) -> None:
    state = matched_job()
    command = settle_command(state)
    raw = bytearray.fromhex(command.receipt)
    raw[at] ^= 0x80
    (event,) = decide_settle_result(state, command.model_copy(update={"receipt": raw.hex()}))
    assert isinstance(event, ResultRejected)


@pytest.mark.parametrize("status", [Status.REFUSED, Status.FAILED])
def test_a_refused_or_failed_job_is_sealed_free_of_charge(status: Status) -> None:
    state = matched_job()
    sealed, paid = decide_settle_result(
        state, settle_command(state, status=status, price_nanoton=0)
    )
    assert isinstance(sealed, ResultSealed)
    assert isinstance(paid, PaymentSettled)
    assert (sealed.status, paid.price_nanoton, paid.released_nanoton) == (
        status.name.lower(), 0, 10_000,
    )  # fmt: skip


@pytest.mark.parametrize("status", [Status.LENGTH, Status.CANCELLED])
def test_what_was_delivered_before_the_end_is_paid(status: Status) -> None:
    state = matched_job()
    _, paid = decide_settle_result(state, settle_command(state, status=status))
    assert isinstance(paid, PaymentSettled)
    assert paid.price_nanoton == 285


@pytest.mark.parametrize(
    ("counts", "price", "held"),
    [
        ({"input_tokens": 1000}, 980 + 5 + 200, 10_000),
        ({"output_tokens": 1000}, 80 + 5 + 4000, 10_000),
        ({}, 285, 285),
    ],
    ids=["all the input", "all the output", "all of the hold"],
)
def test_a_job_that_used_just_what_it_may_is_paid(
    counts: dict[str, int], price: int, held: int
) -> None:
    state = replace(matched_job(), held_nanoton=held)
    _, paid = decide_settle_result(state, settle_command(state, price_nanoton=price, **counts))
    assert isinstance(paid, PaymentSettled)
    assert (paid.price_nanoton, paid.released_nanoton) == (price, held - price)


def test_more_than_the_hold_is_never_paid() -> None:
    state = replace(matched_job(), held_nanoton=284)
    assert rejected_reason(state) == "above_hold"


def test_a_stranger_cannot_even_grow_the_jobs_stream() -> None:
    state = matched_job(providers=(ALICE,))
    with pytest.raises(BadRequest, check=says_why) as refused:
        decide_settle_result(state, settle_command(state, provider=BOB))
    assert refused.value.code == "not_matched"
    with pytest.raises(BadRequest, check=says_why):
        decide_settle_result(state, settle_command(state, epoch=2))
    with pytest.raises(BadRequest, check=says_why):
        decide_settle_result(JobState(), settle_command(state))


def rematched() -> tuple[JobState, Provider]:
    """A job in its second epoch, and the provider of its first."""
    first = matched_job()
    assert first.match is not None
    return fold(decide_expire_lease(first, expire_command()), first), provider_of(first.match)


def test_stale_epoch_is_never_paid() -> None:
    state, slow = rematched()
    first = matched_job()
    (event,) = decide_settle_result(state, settle_command(first))
    assert isinstance(event, ResultRejected)
    assert (event.reason, event.provider_id, event.epoch) == ("stale_epoch", slow.id, 1)
    again = fold([event], state)
    assert decide_settle_result(again, settle_command(first)) == ()


def test_the_live_epoch_is_paid_though_a_stale_result_came_before() -> None:
    state, _ = rematched()
    state = fold(decide_settle_result(state, settle_command(matched_job())), state)
    sealed, paid = decide_settle_result(state, settle_command(state))
    assert isinstance(sealed, ResultSealed)
    assert isinstance(paid, PaymentSettled)
    assert paid.epoch == 2


@pytest.mark.parametrize("changes", [{"cancelled": True}, {"may_rematch": False}])
def test_a_result_after_the_end_is_refused_once(changes: dict[str, object]) -> None:
    state = matched_job()
    command = settle_command(state)
    ended = fold(decide_expire_lease(state, expire_command(**changes)), state)
    (event,) = decide_settle_result(ended, command)
    assert isinstance(event, ResultRejected)
    assert event.reason == "stale_epoch"
    assert decide_settle_result(fold([event], ended), command) == ()


def test_a_repeated_result_changes_nothing() -> None:
    state = matched_job()
    command = settle_command(state)
    settled = fold(decide_settle_result(state, command), state)
    assert decide_settle_result(settled, command) == ()
    other = settle_command(state, last_ms=NOW_MS + 99)
    assert decide_settle_result(settled, other) == ()
