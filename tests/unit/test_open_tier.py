"""The open tier in shard 0: its limits stand with the policy that set them, and with no other."""

from __future__ import annotations

import pytest

from cocoon.contracts.commands import PublishPolicy, decode_command
from cocoon.contracts.events import EventData, OpenTierLimitsSet, PolicyPublished
from cocoon.contracts.matching import OpenTierLimits
from cocoon.domain.decide import decide, stream_of
from cocoon.domain.open_tier import evolve, fits
from tests.support.example_events import EXAMPLES
from tests.support.job_world import POLICY, hex32

LIMITS = OpenTierLimits(max_running_jobs=2, max_job_nanoton=1000)
SET = OpenTierLimitsSet(policy_hash=POLICY, limits=LIMITS)
PUBLISHED = PolicyPublished(policy_hash=POLICY, version=1, previous_hash=None)
OPENED = PublishPolicy(policy_hash=POLICY, version=1, previous_hash=None, open_tier=LIMITS)


def after(*events: EventData) -> OpenTierLimitsSet | None:
    known = None
    for event in events:
        known = evolve(known, event)
    return known


def test_a_policy_that_allows_the_open_tier_sets_its_limits_first() -> None:
    assert decide(None, OPENED) == (SET, PUBLISHED)
    assert decide(None, decode_command(OPENED.to_stored())) == (SET, PUBLISHED)
    assert stream_of(OPENED) == "policy/network"


def test_a_policy_without_one_is_published_as_it_always_was() -> None:
    stored = (
        b'{"command":{"policy_hash":"%b","previous_hash":null,"version":1},'
        b'"type":"PublishPolicy"}' % POLICY.encode()
    )
    assert decide(None, decode_command(stored)) == (PUBLISHED,)


def test_limits_hold_with_their_policy_and_end_with_it() -> None:
    assert after(PUBLISHED) is None
    assert after(SET) == after(SET, PUBLISHED) == SET
    narrower = SET.model_copy(update={"policy_hash": hex32("next")})
    assert after(SET, PUBLISHED, narrower) == narrower
    closed = PUBLISHED.model_copy(update={"policy_hash": hex32("next"), "version": 2})
    assert after(SET, PUBLISHED, closed) is None
    assert after(SET, PUBLISHED, narrower, closed) == narrower


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.event_type)
def test_no_other_event_changes_the_limits(event: EventData) -> None:
    if not isinstance(event, OpenTierLimitsSet | PolicyPublished):
        assert evolve(SET, event) == SET
        assert evolve(None, event) is None


@pytest.mark.parametrize(
    ("limits", "running", "most_nanoton", "fitting"),
    [
        (LIMITS, 0, 0, True),
        (LIMITS, 1, 1000, True),
        (LIMITS, 2, 1000, False),
        (LIMITS, 1, 1001, False),
        (None, 0, 0, False),
    ],
)
def test_a_job_fits_an_open_provider_within_both_limits_and_nowhere_without_any(
    limits: OpenTierLimits | None, running: int, most_nanoton: int, fitting: bool
) -> None:
    assert fits(limits, running=running, most_nanoton=most_nanoton) is fitting
