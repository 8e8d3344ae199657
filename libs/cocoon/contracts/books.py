"""What a provider may ask of billing, and what it is told: `rpc.books.<provider_id>.<verb>`.

A provider hears of its own jobs only. Answers are bounded; `after` pages.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32, Name, Nanoton, TimeMs
from cocoon.contracts.events import Epoch

MAX_ROWS = 200
DAY_MS = 86_400_000
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]
Total = Annotated[int, Field(ge=0, le=2**63 - 1)]  # of tokens or jobs
Day = Annotated[int, Field(ge=0, le=10**8)]  # since 1970-01-01, UTC
Page = Annotated[str, Field(max_length=128, pattern=r"^[\x21-\x7e]*$")]


class EarningsRequest(Contract):
    """`since_day`: the first day (UTC) that counts. `receipts`: with each job, its receipt."""

    by: Literal["day", "model", "job"] = "day"
    since_day: Day = 0
    after: Page = ""  # the answer's `next`
    limit: Rows = MAX_ROWS
    receipts: bool = False  # for by = "job" alone


class Earned(Contract):
    """What jobs brought. `price`: what clients paid; `earned`: the provider's part of it."""

    jobs: Total = 0
    input_tokens: Total = 0
    cached_input_tokens: Total = 0
    output_tokens: Total = 0
    reasoning_tokens: Total = 0
    earned_nanoton: Nanoton = 0


class EarnedBy(Earned):
    """One day, or one model, or one job (`jobs` is 1)."""

    day: Day | None = None
    model_id: Hex32 | None = None
    model: str = ""  # its name in an offer, where there is one
    job_id: Hex16 | None = None
    at_ms: TimeMs | None = None
    shard: Count | None = None
    position: Annotated[int, Field(ge=1, le=2**53)] | None = None  # of PaymentSettled in the log
    epoch: Epoch | None = None
    status: Name | None = None
    price_nanoton: Nanoton | None = None
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")] | None = None
    signing_key: Hex32 | None = None  # that the match cites: it signed the receipt


class InTransit(Contract):
    """Jobs that are matched to the provider and have no result in the log yet."""

    jobs: Total = 0
    most_nanoton: Nanoton = 0  # its part, if each cost what is held for it


class Refused(Contract):
    """A result that was not paid, and why."""

    job_id: Hex16
    epoch: Epoch
    reason: Name
    at_ms: TimeMs


class Earnings(Contract):
    """One state of the books. `total`: of every day since `since_day`, whatever the page shows."""

    provider_id: Name
    balance_nanoton: Nanoton  # of provider:<id> in the ledger, over all shards
    total: Earned
    today: Earned
    rows: tuple[EarnedBy, ...]
    next: Page = ""
    in_transit: InTransit
    refused: tuple[Refused, ...]  # the latest
    refused_results: Total


class LostRequest(Contract):
    """Jobs that went elsewhere, the newest first."""

    since_ms: TimeMs = 0
    job_id: Hex16 | None = None
    after: Page = ""
    limit: Rows = 50


class LostJob(Contract):
    job_id: Hex16
    at_ms: TimeMs
    model_id: Hex32
    reason: Name
    margin_bps: Count | None = None
    told: Annotated[str, Field(max_length=500)]


class LostJobs(Contract):
    rows: tuple[LostJob, ...]
    told: Annotated[str, Field(max_length=500)] = ""  # of the one job that was asked for
    next: Page = ""  # not empty: there may be more, also where this page has no row


class SimulateRequest(Contract):
    """What this provider would earn with a model at these prices (nanoTON per million tokens)."""

    model: Annotated[str, Field(min_length=1, max_length=128)]  # a name or a model id
    input_nanoton_per_mtok: Nanoton
    cached_input_nanoton_per_mtok: Nanoton
    output_nanoton_per_mtok: Nanoton
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 16
    hours: Annotated[int, Field(ge=1, le=24 * 31)] = 24 * 7  # of the log's latest, at most


class Simulated(Contract):
    """`enough` is false where the log holds too little demand to say anything."""

    model_id: Hex32
    enough: bool
    told: Annotated[str, Field(max_length=500)]
    jobs: Total  # of this model in the log, that were looked at
    hours_ms: TimeMs  # the time that they span
    won: Total  # of these, by the simulated offer
    per_hour_nanoton: Nanoton = 0
    low_nanoton: Nanoton = 0  # per hour; between low and high: 90 % of the resamples
    high_nanoton: Nanoton = 0
    others: Count = 0  # providers that offer the model now, besides this one
