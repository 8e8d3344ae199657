"""Pure: posted events to what each provider earned by day and model, and what was refused it.

A payment's model and counts are those of the result that one append wrote right before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import EventData, PaymentSettled, ResultRejected, ResultSealed

DAY_US: Final = 86_400_000_000
MODEL_AT: Final = slice(88, 152)  # of a receipt's hex digits (cocoon.sealing.receipt)


class Share(NamedTuple):
    """Whose, where, when, with what: one row of ledger.earnings."""

    provider_id: str
    shard: int
    day: int
    model_id: str


class Counts(Protocol):
    """What of a result is added up: ResultSealed, or its fields as they were read."""

    @property
    def job_id(self) -> str: ...
    @property
    def receipt(self) -> str: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def cached_input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def reasoning_tokens(self) -> int: ...


@dataclass(slots=True)
class Earnings:
    """Rows to add: jobs, tokens (input, cached, output, reasoning), nanoTON; and the refused."""

    by_share: dict[Share, list[int]] = field(default_factory=dict)
    refused: list[tuple[int, int, str, str, int, str]] = field(default_factory=list)

    def take(
        self, stored: StoredEvent, event: EventData, results: Mapping[int, ResultSealed]
    ) -> None:
        """`results`: position -> the result there; a payment looks at the one before it."""
        if isinstance(event, ResultRejected):
            self.refused.append(
                (stored.shard, stored.position, event.provider_id, event.job_id, event.epoch,
                 event.reason)
            )  # fmt: skip
        elif isinstance(event, PaymentSettled):
            day = stored.recorded_at_us // DAY_US
            self.pay(stored.shard, day, event, results.get(stored.position - 1))

    def pay(self, shard: int, day: int, paid: PaymentSettled, result: Counts | None) -> None:
        """`result`: what stands right before the payment in the log, whose ever it is."""
        if result is not None and result.job_id != paid.job_id:
            result = None
        model_id = result.receipt[MODEL_AT] if result is not None else ""
        sums = self.by_share.setdefault(
            Share(paid.provider_id, shard, day, model_id), [0, 0, 0, 0, 0, 0]
        )
        sums[0] += 1
        if result is not None:
            sums[1] += result.input_tokens
            sums[2] += result.cached_input_tokens
            sums[3] += result.output_tokens
            sums[4] += result.reasoning_tokens
        sums[5] += paid.provider_nanoton


def earned(
    posted: Iterable[tuple[StoredEvent, EventData]], results: Mapping[int, ResultSealed]
) -> Earnings:
    """What these posted events add."""
    found = Earnings()
    for stored, event in posted:
        found.take(stored, event, results)
    return found


def results_among(
    events: Iterable[tuple[StoredEvent, EventData | None]],
) -> dict[int, ResultSealed]:
    """Position -> the result there."""
    return {stored.position: e for stored, e in events if isinstance(e, ResultSealed)}


def positions_lacking(
    events: Iterable[tuple[StoredEvent, EventData | None]], results: Mapping[int, ResultSealed]
) -> list[int]:
    """Where the results of payments lie whose result is not among them: a batch began between."""
    return [
        stored.position - 1
        for stored, event in events
        if isinstance(event, PaymentSettled) and stored.position - 1 not in results
        and stored.position > 1
    ]  # fmt: skip
