"""Counts beyond what ciphertext or a client's own count allow are seen, and only those."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts.commands import OpenDispute, SettleResult, decode_command
from cocoon.contracts.events import DisputeOpened, PaymentSettled, ResultRejected, ResultSealed
from cocoon.domain import decide, metering
from cocoon.domain.settling import decide_settle_result
from cocoon.kernel.errors import BadRequest
from tests.support.job_world import matched_job, settle_command


def settled(**changes: Any) -> SettleResult:
    size = changes.pop("response_bytes", 2048)
    command = settle_command(matched_job(), **changes)
    return command.model_copy(update={"metering": metering.RULE, "response_bytes": size})


def outcome(command: SettleResult) -> str:
    events = decide_settle_result(matched_job(), command)
    if isinstance(events[0], ResultRejected):
        assert len(events) == 1
        return events[0].reason
    assert [type(event) for event in events] == [ResultSealed, PaymentSettled]
    return "paid"


def test_what_its_bytes_cannot_carry_is_refused_and_unpaid() -> None:
    least = metering.LEAST_ANSWER_BYTES
    allowance = metering.UNSHOWN_TOKENS + metering.ROUNDED_TOKENS
    most = {"output_tokens": allowance + 10, "reasoning_tokens": 0,
            "price_nanoton": 80 + 5 + 4 * (allowance + 10)}  # fmt: skip
    assert outcome(settled(response_bytes=least + 10, **most)) == "paid"
    assert outcome(settled(response_bytes=least + 9, **most)) == "impossible_counts"
    assert outcome(settled(response_bytes=0, **most)) == "impossible_counts"


def test_declared_reasoning_is_shown_by_no_byte() -> None:
    claims = {"output_tokens": 1000, "reasoning_tokens": 1000, "price_nanoton": 4085}
    assert outcome(settled(response_bytes=600, **claims)) == "paid"
    assert outcome(settled(response_bytes=600, **{**claims, "reasoning_tokens": 800})) == (
        "impossible_counts"
    )


def test_a_command_from_before_the_rule_decides_as_it_did() -> None:
    claims = {"output_tokens": 1000, "price_nanoton": 4085, "response_bytes": 0}
    command = settled(**claims).model_copy(update={"metering": 0})
    stored = command.to_stored().replace(b'"metering":0,', b"")
    assert b"metering" not in stored
    assert decode_command(stored) == command
    assert outcome(command) == "paid"
    assert outcome(settled(**claims)) == "impossible_counts"


def test_a_small_request_holds_few_tokens() -> None:
    assert metering.most_input_tokens(0) == 1024 + 63
    bigger = metering.most_input_tokens(metering.LEAST_REQUEST_BYTES + 100)
    assert bigger == 1100 + 1024 + 63


# ---- the client's own count ----

counts = st.integers(0, 100_000)


def over(**changes: Any) -> str | None:
    fields: dict[str, Any] = {
        "claimed_input": 10, "claimed_output": 10, "claimed_reasoning": 0, "own_input": 10,
        "own_output": 10, "by_tokenizer": True, "messages": 1, **changes,
    }  # fmt: skip
    return metering.overcounted(**fields)


@given(counts, counts, st.integers(0, 64), st.integers(0, 256), st.booleans(), st.integers(1, 9))
def test_an_honest_count_is_never_disputed(
    own_input: int, own_output: int, unshown: int, template: int, by_tokenizer: bool,
    messages: int,
) -> None:  # fmt: skip
    """Rounded up as P0 does, with the special tokens and the template that nobody sees."""
    found = over(
        claimed_input=own_input + template + 8 * messages + 63,
        claimed_output=own_output + unshown + 63, own_input=own_input, own_output=own_output,
        by_tokenizer=by_tokenizer, messages=messages,
    )  # fmt: skip
    assert found is None


@given(st.integers(1000, 100_000), st.booleans())
def test_half_as_much_again_is_disputed(own: int, by_tokenizer: bool) -> None:
    claimed = own + own // 2
    assert over(own_output=own, claimed_output=claimed, by_tokenizer=by_tokenizer) == (
        "output_tokens"
    )
    assert over(own_output=own, claimed_output=claimed, claimed_reasoning=own // 2) is None
    assert over(own_input=own, claimed_input=claimed + 400) == "input_tokens"
    assert over(own_input=own, claimed_input=claimed // 2) is None


# ---- a dispute's event ----


def dispute(**changes: Any) -> OpenDispute:
    fields: dict[str, Any] = {
        "job_id": "0f" * 16, "account_id": "acct_1", "provider_id": "prov_x", "epoch": 1,
        "kind": "output_tokens", "counted_by": "bytes", "claimed_input_tokens": 50,
        "claimed_output_tokens": 500, "claimed_reasoning_tokens": 100, "own_input_tokens": 50,
        "own_output_tokens": 399, "receipt_hash": "11" * 32, **changes,
    }  # fmt: skip
    return OpenDispute(**fields)


def test_a_dispute_is_written_as_it_was_claimed() -> None:
    command = dispute()
    assert decide.stream_of(command) == "dispute/" + "0f" * 16
    again = decode_command(command.to_stored())
    assert decide.decide(decide.initial(decide.stream_of(command)), again) == (
        DisputeOpened(**command.model_dump()),
    )


@pytest.mark.parametrize(
    "changes", [{"own_output_tokens": 400}, {"kind": "input_tokens"}, {"own_output_tokens": 9000}]
)
def test_nothing_is_in_dispute_where_no_more_is_claimed(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        decide.decide(None, dispute(**changes))
    assert refused.value.code == "no_dispute"
