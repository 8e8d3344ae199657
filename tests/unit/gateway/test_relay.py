"""The machine of one job: nothing before the commit, bytes in order and once, one end."""

from __future__ import annotations

from typing import Any

import pytest

from cocoon.contracts.messages import ErrorBody
from cocoon.kernel.errors import Conflict, DeadlineExceeded, Unavailable
from services.gateway.actions import (
    Abandon,
    Ask,
    CancelAtMatcher,
    CancelAtProvider,
    Dispatch,
    Fetch,
    LogView,
    Lookup,
    Report,
    Start,
)  # fmt: skip
from services.gateway.refusals import client_error
from tests.support.relay_world import (
    BLOB,
    RESPONSE,
    TIMING,
    failure,
    frame,
    kinds,
    last,
    match,
    matched_and_committed,
    relay,
    sent,
)


def test_a_stream_is_relayed_as_it_comes_and_began_is_reported_once() -> None:
    machine = relay()
    assert machine.begin() == [Ask()]
    assert machine.on_matched(match(), 1) == [Dispatch(match())]
    assert machine.on_committed(1) == []
    first = machine.on_frame(frame(0, 10), 2)
    assert kinds(first) == ["Start", "Report", "Send"]
    assert first[0] == Start(match(), None)
    assert kinds(machine.on_frame(frame(10, 20), 3)) == ["Send"]
    assert kinds(machine.on_frame(last(20), 4)) == ["Send", "Finish"]
    assert machine.done


def test_the_first_byte_waits_for_the_commit_of_its_own_epoch() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_frame(frame(0, 10), 1) == []
    machine.on_matched(match(2, "prov_b"), 2)
    assert machine.on_committed(1) == []
    assert machine.on_frame(frame(0, 7, 2, "prov_b"), 3) == []
    assert sent(machine.on_committed(2)) == RESPONSE[:7]


def test_a_whole_body_goes_out_at_the_end_with_its_length() -> None:
    machine = relay(stream=False)
    matched_and_committed(machine)
    assert machine.on_frame(frame(0, 100), 1) == []
    actions = machine.on_frame(last(100), 2)
    assert actions[0] == Start(match(), len(RESPONSE))
    assert sent(actions) == RESPONSE
    assert kinds(actions)[-1] == "Finish"


def test_a_lost_provider_before_the_first_byte_is_replaced_unseen() -> None:
    machine = relay(stream=False)
    matched_and_committed(machine)
    machine.on_frame(frame(0, 300), 1)
    actions = machine.on_matched(match(2, "prov_b"), 2)
    assert actions == [CancelAtProvider("prov_a", 1), Dispatch(match(2, "prov_b"))]
    machine.on_committed(2)
    assert machine.on_frame(last(0), 3) == []  # the old provider's
    assert sent(machine.on_frame(last(0, 2, "prov_b"), 4)) == RESPONSE


def test_a_lost_provider_after_the_first_byte_truncates_and_cancels() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 1)
    actions = machine.on_matched(match(2, "prov_b"), 2)
    assert kinds(actions) == ["CancelAtProvider", "CancelAtMatcher", "Fail"]
    assert actions[-1].truncated  # type: ignore[union-attr]
    assert machine.on_frame(frame(0, 10, 2, "prov_b"), 3) == []


def test_a_repeated_match_changes_nothing() -> None:
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_matched(match(), 1) == []
    machine.on_frame(frame(0, 10), 2)
    assert machine.on_matched(match(), 3) == []
    assert sent(machine.on_frame(last(10), 4)) == RESPONSE[10:]


def test_a_gap_is_filled_from_sealed_up_to_the_last_byte() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 1)
    assert machine.on_frame(frame(20, 30), 2) == []
    assert machine.on_frame(last(30), 3) == [Fetch(match(), BLOB, 10, len(RESPONSE))]
    assert machine.on_frame(frame(10, 20), 4) == []  # too late: SEALED has it
    assert sent(machine.on_filled(RESPONSE[10:400])) == RESPONSE[10:400]
    assert kinds(machine.on_filled(RESPONSE[400:] + b"more")) == ["Send", "Finish"]


def test_bytes_beyond_the_buffer_come_from_sealed() -> None:
    machine = relay(stream=False, buffer_limit=100)
    matched_and_committed(machine)
    machine.on_frame(frame(0, 90), 1)
    machine.on_frame(frame(90, 300), 2)
    assert machine.held_bytes == 90
    assert machine.on_frame(last(300), 3) == [Fetch(match(), BLOB, 0, len(RESPONSE))]
    assert machine.held_bytes == 0  # all of it comes again, so none of it need wait
    actions = machine.on_filled(RESPONSE)
    assert actions[0] == Start(match(), len(RESPONSE))
    assert sent(actions) == RESPONSE


def test_a_response_missing_from_sealed_ends_in_an_error() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(last(5), 1)
    actions = machine.on_fill_ended()
    assert failure(actions).code == "response_lost"
    assert machine.on_fill_ended() == []


@pytest.mark.parametrize("outcome", ["busy", "refused", "silent"])
def test_a_dispatch_that_fails_is_reported(outcome: Any) -> None:
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_dispatch(1, outcome, "busy") == [Report(1, outcome, "busy")]
    assert machine.on_dispatch(2, outcome, "busy") == []


def test_a_silent_provider_whose_bytes_have_come_is_not_reported() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 1), 1)
    assert machine.on_dispatch(1, "silent", "none") == []


@pytest.mark.parametrize(
    "code", ["unknown_key", "no_provider_recipient", "no_provider_attestation"]
)
def test_outdated_sealing_is_answered_with_reseal(code: str) -> None:
    error = client_error(ErrorBody(status=503, code=code, message="x"))
    assert isinstance(error, Conflict)
    assert error.code == "reseal"


def test_what_the_provider_said_outweighs_what_the_matcher_concludes() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_dispatch(1, "refused", "unknown_key")
    actions = machine.on_ended(ErrorBody(status=503, code="attempts_exhausted", message="x"))
    assert failure(actions).code == "reseal"


def test_the_matcher_is_asked_twice_and_then_given_up() -> None:
    machine = relay()
    machine.begin()
    assert machine.wake_at_ms == TIMING.repeat_ask_ms
    assert machine.on_time(TIMING.repeat_ask_ms) == [Ask()]
    assert machine.on_time(TIMING.repeat_ask_ms + 1) == []
    actions = machine.on_time(TIMING.match_timeout_ms)
    assert actions[0] == CancelAtMatcher(0)
    assert isinstance(failure(actions), Unavailable)


def test_a_queued_request_waits_until_its_not_after() -> None:
    machine = relay(not_after_in_ms=9_000)
    machine.begin()
    assert machine.on_waiting(0) == []
    assert machine.on_time(4_999) == []
    assert machine.on_waiting(4_999) == []
    assert machine.on_time(8_999) == []
    assert isinstance(failure(machine.on_time(9_000)), DeadlineExceeded)


def test_no_first_byte_until_not_after_is_a_timeout_that_cancels() -> None:
    machine = relay(not_after_in_ms=5_000)
    matched_and_committed(machine)
    assert Lookup() in machine.on_time(TIMING.stall_ms)
    actions = machine.on_time(5_000)
    assert kinds(actions) == ["CancelAtMatcher", "CancelAtProvider", "Fail"]
    assert isinstance(failure(actions), DeadlineExceeded)


def test_a_client_that_leaves_cancels_everywhere() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 3), 1)
    assert machine.on_disconnect() == [CancelAtMatcher(1), CancelAtProvider("prov_a", 1), Abandon()]
    assert machine.on_disconnect() == []


def test_a_repeat_neither_reports_a_dispatch_nor_cancels_the_first_run() -> None:
    machine = relay()
    machine.begin()
    assert machine.on_existing(same_request=True) == [Lookup()]
    assert machine.on_log(LogView(match()), 1) == [Dispatch(match())]
    assert machine.on_dispatch(1, "busy", "busy") == []
    assert machine.on_disconnect() == [Abandon()]


def test_a_repeat_of_a_settled_job_is_read_from_sealed() -> None:
    machine = relay()
    machine.begin()
    machine.on_existing(same_request=True)
    actions = machine.on_log(LogView(match(2, "prov_b"), None, BLOB, len(RESPONSE)), 1)
    assert actions == [Fetch(match(2, "prov_b"), BLOB, 0, len(RESPONSE))]
    actions = machine.on_filled(RESPONSE)
    # reported: whoever has an answer must never be given another one
    assert kinds(actions) == ["Start", "Report", "Send", "Finish"]


def test_another_request_under_the_same_key_is_a_mismatch() -> None:
    machine = relay()
    machine.begin()
    assert failure(machine.on_existing(same_request=False)).code == "idempotency_mismatch"


def test_a_lost_last_frame_is_found_in_the_log() -> None:
    machine = relay()
    matched_and_committed(machine)
    machine.on_frame(frame(0, 10), 10)
    assert machine.on_time(10 + TIMING.stall_ms) == [Lookup()]
    actions = machine.on_log(LogView(match(), None, BLOB, len(RESPONSE)), 3_000)
    assert actions == [Fetch(match(), BLOB, 10, len(RESPONSE))]


def test_a_lost_commit_is_found_in_the_log() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_frame(last(0), 1) == []
    assert sent(machine.on_log(LogView(match()), 2_000)) == RESPONSE


def test_a_missed_new_match_is_found_in_the_log_and_dispatched() -> None:
    machine = relay()
    matched_and_committed(machine)
    actions = machine.on_log(LogView(match(2, "prov_b")), 2_000)
    assert Dispatch(match(2, "prov_b")) in actions
    assert sent(machine.on_frame(last(0, 2, "prov_b"), 2_001)) == RESPONSE


def test_a_match_that_was_never_committed_is_asked_for_again() -> None:
    """The matcher died, or was fenced, between the announcement and its commit."""
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    machine.on_frame(frame(0, 10), 1)
    assert machine.on_time(1 + TIMING.stall_ms) == [Lookup()]
    assert machine.on_log(LogView(None, absent=True), 2_001) == [Ask()]
    assert sent(machine.on_committed(1, "prov_a")) == RESPONSE[:10]


def test_a_log_that_cannot_be_read_is_no_reason_to_ask_again() -> None:
    machine = relay()
    machine.begin()
    machine.on_matched(match(), 0)
    assert machine.on_log(LogView(None), 2_001) == []


def test_of_two_announced_matches_the_committed_one_counts() -> None:
    """A fenced matcher's announcement came first; its successor's match is in the log."""
    machine = relay()
    machine.begin()
    machine.on_matched(match(1, "prov_a"), 0)
    assert machine.on_matched(match(1, "prov_b"), 1) == []
    machine.on_frame(frame(0, 10), 2)
    assert machine.on_committed(1, "prov_b") == [Lookup()]
    assert machine.on_log(LogView(match(1, "prov_b")), 3) == [
        CancelAtProvider("prov_a", 1),
        Dispatch(match(1, "prov_b")),
    ]
    assert machine.on_frame(frame(10, 20), 4) == []
    assert sent(machine.on_frame(last(0, 1, "prov_b"), 5)) == RESPONSE


def test_a_queued_request_is_asked_again_in_case_the_matcher_forgot_it() -> None:
    machine = relay()
    machine.begin()
    machine.on_waiting(0)
    assert machine.on_time(TIMING.waiting_repeat_ms - 1) == []
    assert machine.on_time(TIMING.waiting_repeat_ms) == [Ask()]
    assert machine.on_time(TIMING.waiting_repeat_ms + 1) == []
    machine.on_waiting(5_100)
    assert machine.on_time(5_000 + TIMING.match_timeout_ms) == []


def test_a_refusal_before_any_match_ends_the_job() -> None:
    machine = relay()
    machine.begin()
    error = ErrorBody(status=402, code="insufficient_funds", message="x")
    assert failure(machine.on_refused(error)).code == "insufficient_funds"


def test_a_stale_matchers_refusal_ends_no_job_that_the_log_has() -> None:
    """A fenced matcher refuses what its successor has matched and committed."""
    refusal = ErrorBody(status=503, code="unavailable", message="x")
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_refused(refusal) == [Lookup()]
    assert machine.on_log(LogView(match()), 1) == []
    assert sent(machine.on_frame(last(0), 2)) == RESPONSE
    announced = relay()
    announced.begin()
    announced.on_matched(match(), 0)
    assert announced.on_refused(refusal) == [Lookup()]
    assert announced.on_log(LogView(None, absent=True), 1) == [Ask()]
    assert announced.on_committed(1, "prov_b") == [Lookup()]  # the successor chose another
    assert Dispatch(match(1, "prov_b")) in announced.on_log(LogView(match(1, "prov_b")), 2)
    repeat = relay()
    repeat.begin()
    repeat.on_existing(same_request=True)
    assert repeat.on_refused(refusal) == [Lookup()]


@pytest.mark.parametrize("attached", [False, True])
def test_a_match_refused_twice_that_the_log_does_not_have_fails(attached: bool) -> None:
    machine = relay(attached=attached)
    machine.begin()
    machine.on_matched(match(), 0)
    nothing = LogView(None, absent=True)
    first = ErrorBody(status=409, code="job_id_used", message="x")
    assert machine.on_refused(first) == [Lookup()]
    assert machine.on_log(nothing, 1) == ([] if attached else [Ask()])
    assert machine.on_refused(ErrorBody(status=503, code="unavailable", message="x")) == [Lookup()]
    actions = machine.on_log(nothing, 2)
    assert (CancelAtProvider("prov_a", 1) in actions) is not attached
    assert failure(actions).code == "unavailable"


def test_a_line_leaves_a_job_alone_that_another_line_waits_for() -> None:
    machine = relay()
    matched_and_committed(machine)
    assert machine.on_disconnect(alone=False) == [Abandon()]


@pytest.mark.parametrize("view", [LogView(match(), here=True), LogView(None, here=True)])
def test_the_last_line_cancels_even_if_it_is_a_repeat(view: LogView) -> None:
    machine = relay()
    machine.begin()
    machine.on_existing(same_request=True)
    machine.on_log(view, 1)
    cancels = machine.on_disconnect()[:-1]
    if view.match is None:
        assert cancels == [CancelAtMatcher(0)]
    else:
        assert cancels == [CancelAtMatcher(1), CancelAtProvider("prov_a", 1)]


def test_a_repeat_that_gives_up_cancels_only_what_nobody_else_waits_for() -> None:
    for alone in (False, True):
        machine = relay(attached=True)
        machine.begin()
        machine.on_log(LogView(match(), here=True), 1)
        actions = machine.on_time(60_000, alone=alone)
        assert (CancelAtMatcher(1) in actions) is alone
        assert isinstance(failure(actions), DeadlineExceeded)


def test_a_repeat_of_a_settled_job_cancels_nothing() -> None:
    machine = relay()
    machine.begin()
    machine.on_existing(same_request=True)
    machine.on_log(LogView(match(), None, BLOB, len(RESPONSE), here=True), 1)
    assert machine.on_disconnect() == [Abandon()]
