"""`./cocoon explain`: why a job went to the provider that it went to."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, Json, folder_of
from cocoon.kernel.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from cocoon.domain.explaining import Explanation


def explain(
    job: Annotated[str, typer.Argument(help="The job's id: 32 hex digits.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Tell how each candidate of a job fared: its decisions are made again from the log."""
    from cocoon.kernel.ids import is_job_id

    if not is_job_id(job):
        raise BadRequest("a job's id is 32 hex digits; an answer names it in x-cocoon-job-id")
    folder = folder_of(data)
    running = folder.read_running()
    dsn = folder.dsn("reader").read_text(encoding="utf-8").strip()
    found = asyncio.run(_read(dsn, running.shards[1:], job))
    if not found:
        raise NotFound(f"no shard of this network has a job {job}", code="job_not_found")
    if as_json:
        print(json.dumps({"id": job, "decisions": [one.told() for one in found]}))
        return
    print("\n".join(line for one in found for line in _lines(one)))


async def _read(dsn: str, shards: tuple[int, ...], job: str) -> list[Explanation]:
    from cocoon.eventlog.connection import connect
    from cocoon.eventlog.explaining import explanations

    conn = await connect(dsn, "cocoon-explain")
    try:
        return [one for shard in shards for one in await explanations(conn, shard, job)]
    finally:
        await conn.close(timeout=2)


def _lines(one: Explanation) -> list[str]:
    from cocoon.domain.explaining import sentence

    when = datetime.fromtimestamp(one.decided_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    policy = f"policy {one.policy}" + (f" ({one.policy_hash[:12]})" if one.policy_hash else "")
    wide = max(map(len, one.tiers.values()), default=0)  # none in old logs
    lines = [f"match {one.epoch}, decided {when} by {policy}"]
    for standing in one.standings:
        tier = f"  {one.tiers.get(standing.provider_id, ''):{wide}}" if wide else ""
        lines.append(f"  {standing.provider_id}{tier}  {sentence(standing)}")
    return lines
