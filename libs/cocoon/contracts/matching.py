"""What a client may ask of its provider, and the integers that a matching policy is made of."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Name, Nanoton

Permille = Annotated[int, Field(ge=0, le=1000)]
PartsPerMillion = Annotated[int, Field(ge=0, le=1_000_000)]
Tier = Literal["facility", "attested", "simulated", "open"]
Sort = Literal["price", "latency", "throughput"]
# of a conversation's beginning, made by the client with a secret of its own; "": none
Affinity = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
Priority = Literal["flex", "normal", "priority"]
_Names = Annotated[tuple[Name, ...], Field(max_length=64)]


class Preferences(Contract):
    """What a client asks of its provider. What is not set excludes nobody."""

    order: _Names = ()  # of these the first that can take the job gets it
    fallbacks: bool = True  # whether somebody outside `order` may take it
    only: _Names = ()
    ignore: _Names = ()
    tiers: Annotated[tuple[Tier, ...], Field(max_length=4)] = ()
    quantisations: _Names = ()
    regions: _Names = ()
    sort: Sort | None = None  # the best by this alone, instead of the policy's weights
    max_input_nanoton_per_mtok: Nanoton | None = None
    max_output_nanoton_per_mtok: Nanoton | None = None
    priority: Priority = "normal"  # among the account's own jobs that wait, and no others


class OpenTierLimits(Contract):
    """What the network's policy trusts one provider without a TEE with."""

    max_running_jobs: Annotated[int, Field(ge=1, le=65_536)]  # at once, of one such provider
    max_job_nanoton: Nanoton  # the most that one job may cost there, by its token bounds


class MatchingPolicy(Contract):
    """How one of those who can take a job is chosen; docs/matching.md says what each does."""

    algorithm: Literal[1] = 1  # the code that reads the rest; a change of it is another number
    name: Name
    speed_weight: Permille
    price_weight: Permille
    success_weight: Permille
    warm: Annotated[int, Field(ge=1, le=64)]  # of the pool, who keep a conversation's prefix
    spill_permille: Permille  # a warm one whose load is over the pool's least by more is passed by
    explore_ppm: PartsPerMillion  # of the jobs, those that go to a provider without a history
    explore_jobs: Count  # who has ended fewer jobs has no history
    slow_factor_permille: Annotated[int, Field(ge=1000, le=100_000)]  # over the middle, and over
    slow_us: Count  # this to its first token: it is passed by while others can

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of "cocoon matching policy\\0" and the canonical policy."""
        return hashlib.sha256(b"cocoon matching policy\0" + self.to_canonical()).hexdigest()


BALANCED = MatchingPolicy(
    name="balanced-1", speed_weight=500, price_weight=300, success_weight=200, warm=2,
    spill_permille=250, explore_ppm=20_000, explore_jobs=20, slow_factor_permille=1500,
    slow_us=500_000,
)  # fmt: skip
