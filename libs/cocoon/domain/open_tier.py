"""What the network's policy allows providers without a TEE, as shard 0 tells it.

The limits stand before the policy that they belong to: between the two the newer ones hold, and
nobody is without any in between.
"""

from __future__ import annotations

from cocoon.contracts.commands import PublishPolicy
from cocoon.contracts.events import EventData, OpenTierLimitsSet, PolicyPublished
from cocoon.contracts.matching import OpenTierLimits

OPEN = "open"


def decide_publish_policy(command: PublishPolicy) -> tuple[EventData, ...]:
    """The policy, after the limits of its open tier where it has one."""
    published = PolicyPublished(
        policy_hash=command.policy_hash,
        version=command.version,
        previous_hash=command.previous_hash,
    )
    if command.open_tier is None:
        return (published,)
    limits = OpenTierLimitsSet(policy_hash=command.policy_hash, limits=command.open_tier)
    return (limits, published)


def evolve(known: OpenTierLimitsSet | None, event: EventData) -> OpenTierLimitsSet | None:
    """Fold an event of the stream policy/network. None: no provider without a TEE gets a job."""
    if isinstance(event, OpenTierLimitsSet):
        return event
    if isinstance(event, PolicyPublished):
        return known if known is not None and known.policy_hash == event.policy_hash else None
    return known


def fits(limits: OpenTierLimits | None, *, running: int, most_nanoton: int) -> bool:
    """Whether an open provider that runs so many jobs may have one that can cost so much."""
    if limits is None:
        return False
    return running < limits.max_running_jobs and most_nanoton <= limits.max_job_nanoton
