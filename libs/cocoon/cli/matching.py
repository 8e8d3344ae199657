"""`./cocoon matching`: the policy that chooses providers, and what another would have done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.session import Data, Json, folder_of
from cocoon.kernel.errors import BadRequest
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from cocoon.contracts.matching import MatchingPolicy
    from cocoon.domain.backtest import Backtest, Outcome

STEP = 4096  # events of the log at a time
app = typer.Typer(
    help="Who gets a job: the policy, and another on the same log.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip


@app.command("show")
def show() -> None:
    """Print this version's policy as JSON: a start for one of your own."""
    from cocoon.contracts.matching import BALANCED

    print(json.dumps(json.loads(BALANCED.to_canonical()), indent=2))


@app.command("backtest")
def run_backtest(
    policy: Annotated[
        Path, typer.Option(metavar="FILE", help="The other policy (see `matching show`).")
    ],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Decide every job of the log again under another policy, and compare who had got what."""
    other = _read_policy(policy)
    folder = folder_of(data)
    running = folder.read_running()
    dsn = folder.dsn("reader").read_text(encoding="utf-8").strip()
    from cocoon.domain.backtest import Backtest

    found = Backtest(other)
    asyncio.run(_take_all(dsn, running.shards[1:], found))
    if as_json:
        print(json.dumps(_told(found)))
        return
    print("\n".join(_lines(found, other.name)))


def _read_policy(path: Path) -> MatchingPolicy:
    from pydantic import ValidationError

    from cocoon.contracts.matching import MatchingPolicy

    try:
        return MatchingPolicy.model_validate_json(path.read_bytes())
    except OSError:
        raise BadRequest(f"{path} cannot be read") from None
    except ValidationError as error:
        names = ", ".join(sorted({str(one["loc"][0]) for one in error.errors() if one["loc"]}))
        raise BadRequest(
            f"{path} is not a matching policy ({names or 'not JSON'}); see `./cocoon matching show`"
        ) from None


async def _take_all(dsn: str, shards: tuple[int, ...], into: Backtest) -> None:
    from cocoon.contracts.commands import RequestJob, decode_command
    from cocoon.eventlog.connection import connect
    from cocoon.eventlog.read import head, read_commands

    conn = await connect(dsn, "cocoon-backtest", patient=True)
    try:
        for shard in shards:
            end = (await head(conn, shard)).position
            for first in range(1, end + 1, STEP):
                for stored in await read_commands(conn, shard, first, first + STEP - 1):
                    command = decode_command(stored.data)
                    if isinstance(command, RequestJob) and stored.first_position >= first:
                        into.take(command)
    finally:
        await conn.close(timeout=2)


def _told(found: Backtest) -> dict[str, Any]:
    def one(outcome: Outcome) -> dict[str, Any]:
        return {
            "jobs": dict(sorted(outcome.jobs.items())),
            "unmatched": outcome.unmatched,
            "nanoton": str(outcome.nanoton),
            "wait_us": outcome.wait_us,
        }

    return {
        "decisions": found.decisions, "moved": found.moved,
        "then": one(found.then), "other": one(found.other),
    }  # fmt: skip


def _lines(found: Backtest, name: str) -> Iterator[str]:
    yield f"{found.decisions:,} jobs; {found.moved:,} would have gone elsewhere"
    for label, outcome in (("as it was", found.then), (name, found.other)):
        matched = max(1, outcome.jobs.total())
        yield (
            f"{label}: at most {format_ton(outcome.nanoton)} TON, "
            f"{outcome.wait_us / matched / 1000:.1f} ms expected to a first token, "
            f"{outcome.unmatched:,} without a provider"
        )
        for provider, jobs in outcome.jobs.most_common():
            yield f"  {provider}  {jobs:,} ({jobs * 100 / matched:.1f} %)"
