"""Billing's gauges: how far stream and ledger lag, the books' sum, what stands aside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cocoon.eventlog.connection import acquired
from cocoon.kernel.errors import CocoonError
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.billing import store

if TYPE_CHECKING:
    from collections.abc import Callable

    from cocoon.eventlog.connection import Pool

log = get_logger("cocoon.billing.gauges")
EVERY_S: Final = 2.0


async def keep_gauges(
    pool: Pool, relayed: Callable[[], Mapping[int, int]], ledgers: Sequence[int], consumer: str
) -> None:
    """Set them for ever. A database that is away leaves them as they were."""
    published: dict[int, int] = {}
    while True:
        try:
            async with acquired(pool) as conn:
                heads = await store.heads(conn, consumer)
                sums = await store.sums(conn)
                parked = await store.parked_counts(conn, consumer)
        except CocoonError as error:
            log.warning("gauges_not_set", code=error.code)
        else:
            for shard, acked in relayed().items():
                metrics.RELAY_LAG.set(max(0, heads[shard][0] - acked), shard)
                risen = acked - published.setdefault(shard, acked)
                metrics.RELAY_PUBLISHED.inc(shard, amount=max(0, risen))
                published[shard] = acked
            for shard in ledgers:
                head, applied = heads[shard]
                metrics.TAIL_LAG.set(max(0, head - applied), shard, consumer)
                metrics.LEDGER_IMBALANCE.set(sums.get(shard, 0), shard)
                metrics.PARKED_EVENTS.set(parked.get(shard, 0), shard, consumer)
        await asyncio.sleep(EVERY_S)
