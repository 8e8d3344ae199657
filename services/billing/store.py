"""Billing's SQL: the ledger's tables. The log's own tables belong to cocoon.eventlog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    projection = posting.projection
    if not projection.entries and not projection.settlements:
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
        *_columns(paid, 9),
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
