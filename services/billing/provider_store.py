"""Billing's SQL for one provider's questions: it reads, by an index, and no more than a bound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cocoon.contracts.books import Earned, EarnedBy, InTransit, Refused
from cocoon.domain.pricing import TokenCounts, split
from services.billing.earning import DAY_US, MODEL_AT

if TYPE_CHECKING:
    import asyncpg

    from cocoon.eventlog.connection import Connection

MAX_HOLDS: Final = 20_000  # running jobs that are looked at for what is in transit
REFUSALS_SHOWN: Final = 20
_SUMS = (
    "coalesce(sum(jobs), 0)::bigint AS jobs,"
    " coalesce(sum(input_tokens), 0)::bigint AS input_tokens,"
    " coalesce(sum(cached_input_tokens), 0)::bigint AS cached_input_tokens,"
    " coalesce(sum(output_tokens), 0)::bigint AS output_tokens,"
    " coalesce(sum(reasoning_tokens), 0)::bigint AS reasoning_tokens,"
    " coalesce(sum(earned), 0)::bigint AS earned_nanoton"
)
_JOBS = """
SELECT s.job_id, s.position, s.price, s.provider_part, paid.recorded_at, sealed.data,
       (SELECT m.data::json ->> 'signing_key' FROM log.events m
         WHERE $6 AND m.shard = s.shard AND m.stream = paid.stream AND m.type = 'ProviderMatched'
           AND m.version < paid.version ORDER BY m.version DESC LIMIT 1) AS signing_key
  FROM ledger.settlements s
  JOIN log.events paid ON paid.shard = s.shard AND paid.position = s.position
  LEFT JOIN log.events sealed ON sealed.shard = s.shard AND sealed.position = s.position - 1
   AND sealed.type = 'ResultSealed' AND sealed.stream = paid.stream
 WHERE s.provider_id = $1 AND s.shard = $2 AND s.position >= $3 AND s.position < $4
 ORDER BY s.position DESC LIMIT $5
"""
_TRANSIT = """
SELECT b.amount, last.data
  FROM ledger.balances b
 CROSS JOIN LATERAL (
       SELECT e.type, e.data FROM log.events e
        WHERE e.shard = b.shard AND e.stream = 'job/' || substr(b.account, 6)
          AND e.type IN ('ProviderMatched', 'LeaseExpired')
        ORDER BY e.version DESC LIMIT 1) last
 WHERE b.owner <> '' AND last.type = 'ProviderMatched'
 LIMIT $1
"""


async def balance(conn: Connection, shards: Sequence[int], provider_id: str) -> int:
    """The provider's balance in nanoTON, over all shards."""
    return int(
        await conn.fetchval(
            "SELECT coalesce(sum(amount), 0)::bigint FROM ledger.balances"
            " WHERE shard = ANY($1::int[]) AND account = $2",
            shards, f"provider:{provider_id}",
        )
    )  # fmt: skip


async def total(conn: Connection, provider_id: str, since_day: int) -> Earned:
    """Everything since a day."""
    row = await conn.fetchrow(
        f"SELECT {_SUMS} FROM ledger.earnings WHERE provider_id = $1 AND day >= $2",  # noqa: S608
        provider_id, since_day,
    )  # fmt: skip
    assert row is not None  # noqa: S101 - an aggregate has one row
    return Earned.model_validate(dict(row))


async def by_day(
    conn: Connection, provider_id: str, since_day: int, before: int, limit: int
) -> list[EarnedBy]:
    """Days since `since_day` and before `before`, the newest first."""
    rows = await conn.fetch(
        f"SELECT day, {_SUMS} FROM ledger.earnings"  # noqa: S608 - constants only
        " WHERE provider_id = $1 AND day >= $2 AND day < $3 GROUP BY day ORDER BY day DESC"
        " LIMIT $4",
        provider_id, since_day, before, limit,
    )  # fmt: skip
    return [EarnedBy.model_validate(dict(row)) for row in rows]


async def by_model(
    conn: Connection, provider_id: str, since_day: int, after: str | None, limit: int
) -> list[tuple[str, EarnedBy]]:
    """(model id or "", its sums), in order of the ids after `after`."""
    rows = await conn.fetch(
        f"SELECT model_id, {_SUMS} FROM ledger.earnings"  # noqa: S608 - constants only
        " WHERE provider_id = $1 AND day >= $2 AND ($3::text IS NULL OR model_id > $3)"
        " GROUP BY model_id ORDER BY model_id LIMIT $4",
        provider_id, since_day, after, limit,
    )  # fmt: skip
    return [
        (row["model_id"], EarnedBy.model_validate({**row, "model_id": row["model_id"] or None}))
        for row in rows
    ]


async def by_job(
    conn: Connection, provider_id: str, shard: int, first: int, before: int, limit: int,
    *, receipts: bool,
) -> list[EarnedBy]:  # fmt: skip
    """Paid jobs of a shard at positions first..before - 1, the newest first."""
    rows = await conn.fetch(_JOBS, provider_id, shard, first, before, limit, receipts)
    return [_job(row, shard, receipts=receipts) for row in rows]


def _job(row: asyncpg.Record, shard: int, *, receipts: bool) -> EarnedBy:
    result: dict[str, Any] = json.loads(row["data"]) if row["data"] else {}
    counts = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens")
    receipt = result.get("receipt")
    return EarnedBy(
        jobs=1,
        earned_nanoton=row["provider_part"],
        price_nanoton=row["price"],
        job_id=row["job_id"],
        at_ms=row["recorded_at"] // 1000,
        shard=shard,
        position=row["position"],
        model_id=receipt[MODEL_AT] if receipt else None,
        epoch=result.get("epoch"),
        status=result.get("status"),
        receipt=receipt if receipts else None,
        signing_key=row["signing_key"] if receipts else None,
        **{name: result.get(name, 0) for name in counts},
    )


async def refused(
    conn: Connection, shards: Sequence[int], provider_id: str, since_us: int
) -> tuple[list[Refused], int]:
    """The latest refused results since a time, and how many there are."""
    rows = await conn.fetch(
        "SELECT r.job_id, r.epoch, r.reason, e.recorded_at / 1000 AS at_ms,"
        " count(*) OVER () AS results FROM ledger.refusals r"
        " JOIN log.events e ON e.shard = r.shard AND e.position = r.position"
        " WHERE r.provider_id = $1 AND r.shard = ANY($2::int[]) AND e.recorded_at >= $3"
        " ORDER BY e.recorded_at DESC, r.shard, r.position DESC LIMIT $4",
        provider_id, shards, since_us, REFUSALS_SHOWN,
    )  # fmt: skip
    found = [
        Refused(job_id=r["job_id"], epoch=r["epoch"], reason=r["reason"], at_ms=r["at_ms"])
        for r in rows
    ]
    return found, int(rows[0]["results"]) if rows else 0


async def in_transit(conn: Connection) -> dict[str, InTransit]:
    """Every provider's running jobs, and what they can bring it at most."""
    found: dict[str, tuple[int, int]] = {}
    for row in await conn.fetch(_TRANSIT, MAX_HOLDS):
        match = json.loads(row["data"])
        jobs, most = found.get(match["provider_id"], (0, 0))
        part = split(int(row["amount"]), int(match["quote"]["fee_bps"])).provider
        found[match["provider_id"]] = (jobs + 1, most + part)
    return {name: InTransit(jobs=n, most_nanoton=most) for name, (n, most) in found.items()}


async def outcome(
    conn: Connection, shards: Sequence[int], provider_id: str, job_id: str
) -> tuple[str, str] | None:
    """("paid", nanoTON) or ("refused", why) of a job at this provider; None: neither."""
    paid = await conn.fetchval(
        "SELECT provider_part FROM ledger.settlements WHERE job_id = $1 AND shard = ANY($2::int[])"
        " AND provider_id = $3",
        job_id, shards, provider_id,
    )  # fmt: skip
    if paid is not None:
        return "paid", str(paid)
    reason = await conn.fetchval(
        "SELECT data::json ->> 'reason' FROM log.events WHERE shard = ANY($1::int[])"
        " AND stream = $2 AND type = 'ResultRejected' AND data::json ->> 'provider_id' = $3"
        " ORDER BY version DESC LIMIT 1",
        shards, f"job/{job_id}", provider_id,
    )  # fmt: skip
    return None if reason is None else ("refused", str(reason))


@dataclass(frozen=True, slots=True)
class Result:
    """What a job used, and when its result came (Unix milliseconds)."""

    counts: TokenCounts
    at_ms: int


async def results(conn: Connection, shard: int, first: int, last: int) -> dict[str, Result]:
    """Job id -> the result that the positions first..last hold of it."""
    rows = await conn.fetch(
        "SELECT recorded_at / 1000 AS at_ms, r.* FROM log.events e, json_to_record(data::json) AS"
        " r(job_id text, input_tokens bigint, cached_input_tokens bigint, output_tokens bigint,"
        " reasoning_tokens bigint) WHERE e.shard = $1 AND e.position BETWEEN $2 AND $3"
        " AND e.type = 'ResultSealed'",
        shard, first, last,
    )  # fmt: skip
    return {
        row["job_id"]: Result(
            TokenCounts(
                row["input_tokens"], row["cached_input_tokens"], row["output_tokens"],
                row["reasoning_tokens"],
            ),
            row["at_ms"],
        )
        for row in rows
    }  # fmt: skip


def day_start_us(day: int) -> int:
    return day * DAY_US
