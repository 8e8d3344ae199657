"""Pure: posted events to what each provider earned by day and model, and what was refused it.

A payment's model and counts are those of the result that one append wrote right before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

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
            result = results.get(stored.position - 1)
            if result is not None and result.job_id != event.job_id:
                result = None
            share = Share(
                event.provider_id, stored.shard, stored.recorded_at_us // DAY_US,
                result.receipt[MODEL_AT] if result else "",
            )  # fmt: skip
            sums = self.by_share.setdefault(share, [0, 0, 0, 0, 0, 0])
            counts = (
                (result.input_tokens, result.cached_input_tokens, result.output_tokens,
                 result.reasoning_tokens) if result else (0, 0, 0, 0)
            )  # fmt: skip
            for index, more in enumerate((1, *counts, event.provider_nanoton)):
                sums[index] += more


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
