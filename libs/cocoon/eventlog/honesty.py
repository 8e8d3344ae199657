"""What canaries and clients said of providers, from the log: tests and verdicts, and disputes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cocoon.contracts.events import CanaryJudged, DisputeOpened, HonestyDecided, decode_event
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.domain.honesty import HonestyState, evolve
from cocoon.eventlog.connection import tree_errors

if TYPE_CHECKING:
    from cocoon.contracts.events import EventData
    from cocoon.eventlog.connection import Connection

MAX_EVENTS = 1_000_000


@dataclass(slots=True)
class Standing:
    """One provider's."""

    state: HonestyState = field(default_factory=HonestyState)
    outcomes: Counter[str] = field(default_factory=Counter)  # of all its canaries
    verdicts: Counter[str] = field(default_factory=Counter)
    disputes: Counter[str] = field(default_factory=Counter)  # by kind

    def told(self) -> dict[str, Any]:
        return {
            "canaries": dict(self.outcomes),
            "verdicts": dict(self.verdicts),
            "dishonest": list(self.state.dishonest),
            "tests": {
                model: {"judged": test.judged, "differed": test.differed, "unclear": test.unclear,
                        "score_unats": test.score_unats, "rule": test.rule.model_dump()}
                for model, test in self.state.tests
            },
            "disputes": dict(self.disputes),
        }  # fmt: skip


async def standings(conn: Connection, shards: Sequence[int]) -> dict[str, Standing]:
    """By provider id: shard 0's tests, and the disputes of these account shards."""
    found: dict[str, Standing] = {}
    for event in await _events(conn, NETWORK_SHARD, "honesty/"):
        one = found.setdefault(event.provider_id, Standing())  # type: ignore[attr-defined]
        one.state = evolve(one.state, event)
        if isinstance(event, CanaryJudged):
            one.outcomes[event.outcome] += 1
        elif isinstance(event, HonestyDecided):
            one.verdicts[event.verdict] += 1
    for shard in shards:
        for event in await _events(conn, shard, "dispute/"):
            if isinstance(event, DisputeOpened):
                found.setdefault(event.provider_id, Standing()).disputes[event.kind] += 1
    return found


async def _events(conn: Connection, shard: int, begin: str) -> list[EventData]:
    with tree_errors():
        rows = await conn.fetch(
            "SELECT type, schema_version, data FROM log.events"
            " WHERE shard = $1 AND starts_with(stream, $2) ORDER BY position LIMIT $3",
            shard,
            begin,
            MAX_EVENTS,
        )
    return [decode_event(row["type"], row["schema_version"], row["data"]) for row in rows]
