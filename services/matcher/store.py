"""The matcher's SQL: its unrevealed secrets. The log's own tables belong to cocoon.eventlog."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cocoon.domain.seeding import commitment
from cocoon.eventlog.connection import acquired, tree_errors

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool


class Secrets:
    """One shard's, in Postgres. All raise Unavailable."""

    def __init__(self, pool: Pool, shard: int) -> None:
        self._pool, self._shard = pool, shard

    async def load(self) -> list[bytes]:
        """What was kept and not forgotten."""
        async with acquired(self._pool) as conn:
            with tree_errors():
                rows = await conn.fetch(
                    "SELECT secret FROM matcher.secrets WHERE shard = $1", self._shard
                )
        return [bytes(row["secret"]) for row in rows]

    async def keep(self, secret: bytes) -> None:
        async with acquired(self._pool) as conn:
            with tree_errors():
                await conn.execute(
                    "INSERT INTO matcher.secrets (shard, commitment, secret) VALUES ($1, $2, $3)"
                    " ON CONFLICT DO NOTHING",
                    self._shard,
                    commitment(secret),
                    secret,
                )

    async def forget(self, secret: bytes) -> None:
        async with acquired(self._pool) as conn:
            with tree_errors():
                await conn.execute(
                    "DELETE FROM matcher.secrets WHERE shard = $1 AND commitment = $2",
                    self._shard,
                    commitment(secret),
                )
