"""Billing's SQL: the ledger's tables. The log's own tables belong to cocoon.eventlog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.billing.earning import Share
from services.billing.posting import Posting

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection


# Everything a batch does in one statement: a round trip costs more than any of its parts.
_WRITE = """
WITH entries AS (
  INSERT INTO ledger.entries (shard, position, line, account, amount)
    SELECT * FROM unnest($1::int[], $2::bigint[], $3::int[], $4::text[], $5::bigint[])
), kept AS (
  INSERT INTO ledger.balances AS b (shard, account, amount, owner)
    SELECT $6, * FROM unnest($7::text[], $8::bigint[], $9::text[])
    ON CONFLICT (shard, account) DO UPDATE SET amount = excluded.amount
), gone AS (
  DELETE FROM ledger.balances WHERE shard = $6 AND account = ANY($10::text[])
), refused AS (
  INSERT INTO ledger.refusals (shard, position, provider_id, job_id, epoch, reason)
    SELECT * FROM unnest($20::int[], $21::bigint[], $22::text[], $23::text[], $24::bigint[],
                         $25::text[])
), earned AS (
  INSERT INTO ledger.earnings AS e (provider_id, shard, day, model_id, jobs, input_tokens,
      cached_input_tokens, output_tokens, reasoning_tokens, earned)
    SELECT * FROM unnest($26::text[], $27::int[], $28::int[], $29::text[], $30::bigint[],
        $31::bigint[], $32::bigint[], $33::bigint[], $34::bigint[], $35::bigint[])
    ON CONFLICT (provider_id, shard, day, model_id) DO UPDATE SET jobs = e.jobs + excluded.jobs,
      input_tokens = e.input_tokens + excluded.input_tokens,
      cached_input_tokens = e.cached_input_tokens + excluded.cached_input_tokens,
      output_tokens = e.output_tokens + excluded.output_tokens,
      reasoning_tokens = e.reasoning_tokens + excluded.reasoning_tokens,
      earned = e.earned + excluded.earned
)
INSERT INTO ledger.settlements (job_id, shard, position, account_id, api_key_id, provider_id,
                                price, provider_part, fee)
  SELECT * FROM unnest($11::text[], $12::int[], $13::bigint[], $14::text[], $15::text[],
                       $16::text[], $17::bigint[], $18::bigint[], $19::bigint[])
"""


async def balances(conn: Connection, shard: int, accounts: Sequence[str]) -> dict[str, int]:
    """The balances of these accounts in nanoTON; one that is missing has none."""
    if not accounts:
        return {}
    rows = await conn.fetch(
        "SELECT account, amount FROM ledger.balances WHERE shard = $1 AND account = ANY($2)",
        shard,
        accounts,
    )
    return {row["account"]: int(row["amount"]) for row in rows}


async def write(conn: Connection, shard: int, posting: Posting) -> None:
    """Write a batch in the caller's transaction, in which its balances were read.

    The tables' checks refuse a negative balance: a second wall behind services.billing.posting.
    """
    projection, earnings = posting.projection, posting.earnings
    if not (projection.entries or projection.settlements or earnings.refused):
        return
    # A hold that opens and closes in one batch never has a row; one that closes loses it.
    kept = [(a, n, posting.owners.get(a, "")) for a, n in posting.balances.items() if n]
    gone = [account for account, amount in posting.balances.items() if not amount]
    paid = [
        (
            s.event.job_id, s.shard, s.position, s.event.account_id, s.event.api_key_id,
            s.event.provider_id, s.event.price_nanoton, s.event.provider_nanoton,
            s.event.fee_nanoton,
        )
        for s in projection.settlements
    ]  # fmt: skip
    await conn.execute(
        _WRITE, *_columns(projection.entries, 5), shard, *_columns(kept, 3), gone,
        *_columns(paid, 9), *_columns(earnings.refused, 6),
        *_columns([(*share, *sums) for share, sums in earnings.by_share.items()], 10),
    )  # fmt: skip


def _columns(rows: Sequence[tuple[object, ...]], width: int) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


@dataclass(frozen=True, slots=True)
class Balance:
    """A client's money in nanoTON: what is free, and what its running jobs hold."""

    available: int
    held: int


async def client_balance(conn: Connection, shard: int, account_id: str) -> Balance:
    """Two reads by index; what they cost grows with the account's running jobs alone."""
    available = await conn.fetchval(
        "SELECT amount FROM ledger.balances WHERE shard = $1 AND account = $2",
        shard,
        f"client:{account_id}",
    )
    held = await conn.fetchval(
        "SELECT coalesce(sum(amount), 0) FROM ledger.balances WHERE shard = $1 AND owner = $2"
        " AND owner <> ''",
        shard,
        account_id,
    )
    return Balance(available=int(available or 0), held=int(held or 0))


async def heads(conn: Connection, consumer: str) -> dict[int, tuple[int, int]]:
    """Shard -> the log's last position, and the last that the consumer has applied."""
    rows = await conn.fetch(
        "SELECT h.shard, h.position, coalesce(c.position, 0) AS applied FROM log.head h"
        " LEFT JOIN log.checkpoints c ON c.shard = h.shard AND c.consumer = $1",
        consumer,
    )
    return {row["shard"]: (row["position"], row["applied"]) for row in rows}


async def sums(conn: Connection) -> dict[int, int]:
    """Shard -> the sum of its books in nanoTON, which is zero or an alarm."""
    rows = await conn.fetch(
        "SELECT shard, sum(amount)::bigint AS amount FROM ledger.balances GROUP BY shard"
    )
    return {row["shard"]: int(row["amount"]) for row in rows}


async def parked_counts(conn: Connection, consumer: str) -> dict[int, int]:
    """Shard -> events that stand aside."""
    rows = await conn.fetch(
        "SELECT shard, count(*) AS events FROM log.parked WHERE consumer = $1 GROUP BY shard",
        consumer,
    )
    return {row["shard"]: int(row["events"]) for row in rows}


# The rows of a range as `services.billing.books.lines_of` writes them.
_LINES = """
SELECT coalesce(string_agg(r.text, '' ORDER BY r.position, r.line), '') FROM (
  SELECT position, line,
      position || ' ' || line || ' ' || account || ' ' || amount || E'\\n' AS text
    FROM ledger.entries WHERE shard = $1 AND position BETWEEN $2 AND $3
  UNION ALL
  SELECT position, 2147483647, position || ' paid ' || job_id || ' ' || account_id || ' '
      || api_key_id || ' ' || provider_id || ' ' || price || ' ' || provider_part || ' ' || fee
      || E'\\n'
    FROM ledger.settlements WHERE shard = $1 AND position BETWEEN $2 AND $3
) r
"""
_OUTSIDE = """
SELECT position FROM ledger.entries WHERE shard = $1 AND (position < 1 OR position > $2)
UNION ALL
SELECT position FROM ledger.settlements WHERE shard = $1 AND (position < 1 OR position > $2)
UNION ALL
SELECT position FROM ledger.refusals WHERE shard = $1 AND (position < 1 OR position > $2)
LIMIT 1
"""


async def lines(conn: Connection, shard: int, first: int, last: int) -> str:
    """Entries and payments of the positions first..last, a line each, in order."""
    return str(await conn.fetchval(_LINES, shard, first, last))


async def refusal_lines(conn: Connection, shard: int, first: int, last: int) -> str:
    """The refused results of the positions first..last, a line each, in order."""
    return str(
        await conn.fetchval(
            "SELECT coalesce(string_agg(position || ' ' || provider_id || ' ' || job_id || ' ' ||"
            " epoch || ' ' || reason || E'\\n', '' ORDER BY position), '') FROM ledger.refusals"
            " WHERE shard = $1 AND position BETWEEN $2 AND $3",
            shard, first, last,
        )
    )  # fmt: skip


async def all_earnings(conn: Connection, shard: int) -> dict[Share, list[int]]:
    """Every row of what providers earned on a shard, as `services.billing.earning` adds it up."""
    rows = await conn.fetch(
        "SELECT provider_id, shard, day, model_id, jobs, input_tokens, cached_input_tokens,"
        " output_tokens, reasoning_tokens, earned FROM ledger.earnings WHERE shard = $1",
        shard,
    )
    return {Share(*row[:4]): list(row[4:]) for row in rows}


async def row_outside(conn: Connection, shard: int, applied: int) -> int | None:
    """The position of a row that no event up to `applied` can have written."""
    position = await conn.fetchval(_OUTSIDE, shard, applied)
    return None if position is None else int(position)


async def all_balances(conn: Connection, shard: int) -> dict[str, int]:
    """Every balance of the shard, nanoTON; inside a transaction."""
    sql = "SELECT account, amount FROM ledger.balances WHERE shard = $1"
    return {row["account"]: row["amount"] async for row in conn.cursor(sql, shard, prefetch=5000)}


async def parked_between(conn: Connection, shard: int, first: int, last: int) -> dict[int, str]:
    """Position -> why, of the ledger's events that stand aside."""
    rows = await conn.fetch(
        "SELECT position, error_class FROM log.parked WHERE shard = $1 AND consumer = 'ledger'"
        " AND position BETWEEN $2 AND $3",
        shard, first, last,
    )  # fmt: skip
    return {row["position"]: row["error_class"] for row in rows}


async def touched(conn: Connection, shard: int, account: str, limit: int) -> list[int]:
    """The last positions that wrote an entry of this account, oldest first."""
    rows = await conn.fetch(
        "SELECT DISTINCT position FROM ledger.entries WHERE shard = $1 AND account = $2"
        " ORDER BY position DESC LIMIT $3",
        shard, account, limit,
    )  # fmt: skip
    return [row["position"] for row in reversed(rows)]


async def snapshot_positions(conn: Connection, shard: int, below: int) -> list[int]:
    """Where snapshots were kept before a position, the newest first."""
    rows = await conn.fetch(
        "SELECT position FROM ledger.snapshots WHERE shard = $1 AND position < $2"
        " ORDER BY position DESC",
        shard, below,
    )  # fmt: skip
    return [row["position"] for row in rows]


async def snapshot(conn: Connection, shard: int, position: int) -> bytes:
    """The bytes of a snapshot, empty if it has gone."""
    sql = "SELECT data FROM ledger.snapshots WHERE shard = $1 AND position = $2"
    return bytes(await conn.fetchval(sql, shard, position) or b"")


async def keep_snapshot(
    conn: Connection, shard: int, position: int, data: bytes, keep: int
) -> None:
    """Keep a snapshot, and only the newest `keep` of the shard's."""
    await conn.execute(
        "INSERT INTO ledger.snapshots (shard, position, data) VALUES ($1, $2, $3)"
        " ON CONFLICT (shard, position) DO UPDATE SET data = excluded.data",
        shard, position, data,
    )  # fmt: skip
    await conn.execute(
        "DELETE FROM ledger.snapshots WHERE shard = $1 AND position NOT IN (SELECT position"
        " FROM ledger.snapshots WHERE shard = $1 ORDER BY position DESC LIMIT $2)",
        shard, keep,
    )  # fmt: skip
