"""`./cocoon provider why` and `simulate`: why it got no job, and what a price would bring."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cocoon.cli.provider_session import Config, Provider, as_provider, read
from cocoon.cli.session import Json
from cocoon.kernel.errors import BadRequest
from cocoon.kernel.money import format_ton, parse_ton

HOUR_MS = 3_600_000
MAX_PAGES = 64  # of some 16,000 events of the log each
MAX_SHOWN = 20
SIMULATE_S = 60.0
_NO_BOOKS = "its books are not told while it is banned, or before it has enrolled"


def why(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="One job's id: 32 hex digits.")
    ] = None,
    hours: Annotated[
        int, typer.Option(min=1, max=24 * 31, help="How far back to look for lost jobs.")
    ] = 24,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Tell which jobs went elsewhere, by which margin, and how the network sees this provider."""
    from cocoon.kernel.ids import is_job_id

    if job is not None and not is_job_id(job):
        raise BadRequest("a job's id is 32 hex digits")

    async def work(provider: Provider) -> dict[str, Any]:
        standing = await provider.standing()
        if standing["banned"] or not standing["enrolled"]:  # then it may ask for nothing else
            return {"standing": standing, "lost": [], "told": _NO_BOOKS, "more": False}
        return {"standing": standing, **await _lost(provider, job, hours)}

    found = as_provider(read(config), work)
    if as_json:
        print(json.dumps(found))
        return
    now_ms = time.time_ns() // 1_000_000
    if job is None:
        print("\n".join(_standing_lines(found["standing"], now_ms)))
        print()
    print("\n".join(_lost_lines(found, job, hours)))


async def _lost(provider: Provider, job: str | None, hours: int) -> dict[str, Any]:
    from cocoon.contracts.books import LostRequest

    since_ms = time.time_ns() // 1_000_000 - hours * HOUR_MS
    lost: list[dict[str, Any]] = []
    after, told = "", ""
    for _ in range(MAX_PAGES):
        page = await provider.books(
            "lost", LostRequest(since_ms=since_ms, job_id=job, after=after, limit=200), 30.0
        )
        lost += page["rows"]
        after, told = page["next"], page["told"]
        if not after:
            break
    return {"lost": lost, "told": told, "more": bool(after)}


def _standing_lines(standing: dict[str, Any], now_ms: int) -> list[str]:
    from cocoon.agent.dropped import sentence

    lines = [f"{standing['provider_id']}, tier {standing['tier'] or 'none yet'}"]
    if not standing["enrolled"]:
        lines.append("  it never enrolled: `./cocoon provider run` does that")
    revoked = standing["revoked"]
    if standing["banned"]:
        canary = revoked is not None and revoked["reason"] == "canary"
        lines.append(f"  {sentence('canary' if canary else 'banned')}")
    if standing["attested"]:
        left = max(0, standing["evidence_valid_until_ms"] - now_ms)
        lines.append(
            f"  its evidence holds until {_when(standing['evidence_valid_until_ms'])} UTC "
            f"({left // 60_000:,} minutes); the agent renews it by itself"
        )
    elif standing["enrolled"]:
        lines.append("  no evidence of it stands, so nobody seals to it")
    if revoked:
        words = "" if standing["banned"] else f"; {sentence(revoked['reason'])}"
        lines.append(f"  dropped at {_when(revoked['at_ms'])} UTC: {revoked['reason']}{words}")
    if standing["last_refusal"]:
        last = standing["last_refusal"]
        lines.append(
            f"  last refused at {_when(last['at_ms'])} UTC ({last['verb']}): {last['code']}; "
            f"{last['message']}"
        )
    lines.append(
        "  clients find it now" if standing["listed"]
        else "  clients do not find it now: no heartbeat, no key, no offer or no evidence"
    )  # fmt: skip
    return lines


def _lost_lines(found: dict[str, Any], job: str | None, hours: int) -> list[str]:
    lost = found["lost"]
    if job is not None:
        lines = [f"  {one['told']}" for one in lost]
        if found["told"]:
            lines.append(f"  {found['told']}")
        return [f"job {job}", *(lines or ["  this provider had no part in it"])]
    if not lost and found["more"]:
        return [f"none went elsewhere in the part of {hours} hours that was looked at; give fewer "
                "--hours"]  # fmt: skip
    if not lost and found["told"] == _NO_BOOKS:
        return [_NO_BOOKS]
    if not lost:
        return [f"no job of its models went elsewhere in {hours} hours"]
    lines = [f"{len(lost):,} jobs went elsewhere in {hours} hours"]
    for reason, count in Counter(one["reason"] for one in lost).most_common():
        margins = sorted(o["margin_bps"] for o in lost if o["reason"] == reason
                         and o["margin_bps"] is not None)  # fmt: skip
        middle = f", by {margins[len(margins) // 2] / 100:g} % in the middle" if margins else ""
        lines.append(f"  {count:>6,}  {reason}{middle}")
    lines.append("")
    lines += [f"  {_when(o['at_ms'])}  {o['job_id']}  {o['told']}" for o in lost[:MAX_SHOWN]]
    if found["more"]:
        lines.append("  (the newest; what lies further back was not looked at)")
    elif len(lost) > MAX_SHOWN:
        lines.append("  (the newest; --json has them all)")
    return lines


def _when(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


# ---- what a price would bring ----


def simulate(
    model: Annotated[str, typer.Option(help="The model: its name, or its model id.")],
    price: Annotated[
        str,
        typer.Option(metavar="P", help="TON per million tokens of the answer, for example 0.08."),
    ],
    input_price: Annotated[
        str | None,
        typer.Option(metavar="P", help="Of the prompt (default: a quarter of --price)."),
    ] = None,
    cached_price: Annotated[
        str | None,
        typer.Option(metavar="P", help="Of a cached prompt (default: half of the prompt's)."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="How many jobs at once.")] = 16,
    hours: Annotated[
        int, typer.Option(min=1, max=24 * 31, help="How much of the latest demand to use.")
    ] = 24 * 7,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Say what an hour would bring at a price, from the jobs that the network really had."""
    from cocoon.contracts.books import SimulateRequest

    output = _ton(price, "--price")
    asked = _ton(input_price, "--input-price") if input_price is not None else output // 4
    cached = _ton(cached_price, "--cached-price") if cached_price is not None else asked // 2
    request = SimulateRequest(
        model=model, input_nanoton_per_mtok=asked, cached_input_nanoton_per_mtok=cached,
        output_nanoton_per_mtok=output, concurrency=concurrency, hours=hours,
    )  # fmt: skip

    async def work(provider: Provider) -> dict[str, Any]:
        return await provider.books("simulate", request, SIMULATE_S)

    found = as_provider(read(config), work)
    if as_json:
        print(json.dumps(found))
        return
    if not found["enough"]:
        print(found["told"])
        return
    print(
        f"about {format_ton(int(found['per_hour_nanoton']))} TON an hour "
        f"({found['per_hour_nanoton']} nanoTON; 90 % of the resamples lie between "
        f"{found['low_nanoton']} and {found['high_nanoton']})\n  {found['told']}"
    )


def _ton(text: str, option: str) -> int:
    try:
        return parse_ton(text)
    except ValueError as error:
        raise BadRequest(f"{option}: {error}") from None
