"""`./cocoon provider earnings`: what its jobs brought, what is on its way, what was refused."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.provider_session import Config, Provider, as_provider, read
from cocoon.cli.session import Json
from cocoon.kernel.errors import BadRequest, ConfigurationError
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from cocoon.contracts.books import EarningsRequest

_EPOCH = date(1970, 1, 1)
MAX_PAGES = 5_000  # of 200 rows: a million jobs


class By(StrEnum):
    DAY = "day"
    MODEL = "model"
    JOB = "job"


def earnings(
    by: Annotated[By, typer.Option(help="A row for each day, model or job.")] = By.DAY,
    since: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="The first day (UTC): 2026-11-01, or 7d (default: all)."),
    ] = None,
    receipts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save each paid job's signed receipt there, checked with the key that signed it.",
        ),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show what this provider earned, by the network's own books."""
    settings = read(config)
    since_day = day_of(since)
    if receipts is not None:
        by = By.JOB
        _make(receipts)

    async def work(provider: Provider) -> dict[str, Any]:
        return await collect(provider, by, since_day, receipts)

    found = as_provider(settings, work)
    if as_json:
        print(json.dumps(found))
        return
    print("\n".join(_lines(found, by)))


def day_of(text: str | None) -> int:
    """Days since 1970: of a date, or so many days ago. Raises BadRequest."""
    if text is None:
        return 0
    today = datetime.now(UTC).date()
    try:
        if text.endswith("d") and text[:-1].isdigit() and len(text) < 7:
            day = today - timedelta(days=int(text[:-1]))
        else:
            day = date.fromisoformat(text)
    except (ValueError, OverflowError):
        raise BadRequest("--since is a day such as 2026-11-01, or a number of days: 7d") from None
    return max(0, (day - _EPOCH).days)


async def collect(
    provider: Provider, by: By, since_day: int, receipts: Path | None
) -> dict[str, Any]:
    """All pages in one; the sums are the first page's. Receipts go into their folder as they come.

    Raises ConfigurationError for a receipt that is not what its payment says.
    """
    from cocoon.contracts.books import EarningsRequest

    first: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    after, saved = "", 0
    for _ in range(MAX_PAGES):
        page = await provider.books("earnings", _request(EarningsRequest, by, since_day, after,
                                                         receipts))  # fmt: skip
        first = first or page
        if receipts is not None:
            saved += sum(_save(row, receipts) for row in page["rows"])
            page["rows"] = [_without_receipt(row) for row in page["rows"]]
        rows += page["rows"]
        after = page["next"]
        if not after:
            break
    first = {**first, "rows": rows, "next": after}
    return {**first, "receipts_saved": saved} if receipts is not None else first


def _request(
    kind: type[EarningsRequest], by: By, since_day: int, after: str, receipts: Path | None
) -> EarningsRequest:
    return kind(by=by.value, since_day=since_day, after=after, receipts=receipts is not None)


# ---- receipts ----


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made ({error.strerror})") from None


def _without_receipt(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("receipt", "signing_key")}


def _save(row: dict[str, Any], folder: Path) -> int:
    """Check and write one receipt; 0 for a job without one."""
    from cocoon.kernel.errors import SealingError
    from cocoon.sealing.receipt import verify_receipt

    if not row.get("receipt") or not row.get("signing_key"):
        return 0
    raw = bytes.fromhex(row["receipt"])
    try:
        receipt = verify_receipt(raw, bytes.fromhex(row["signing_key"]))
    except SealingError:
        raise ConfigurationError(
            f"the receipt of job {row['job_id']} is not signed by the key that its match cites; "
            "the books name a receipt that this provider did not make"
        ) from None
    said = (receipt.job_id.hex(), receipt.price_nanoton, receipt.model_id.hex())
    if said != (row["job_id"], int(row["price_nanoton"]), row["model_id"]):
        raise ConfigurationError(
            f"the receipt of job {row['job_id']} says another job, price or model than its payment"
        )
    place = folder / f"{row['job_id']}-{row['epoch']}.receipt"
    partial = place.with_suffix(".partial")
    try:
        partial.write_bytes(raw)
        partial.replace(place)
    except OSError as error:
        raise ConfigurationError(f"{place} cannot be written ({error.strerror})") from None
    return 1


# ---- for a person ----


def _lines(found: dict[str, Any], by: By) -> list[str]:
    total = found["total"]
    lines = [
        f"{found['provider_id']} has {format_ton(int(found['balance_nanoton']))} TON",
        f"  earned     {format_ton(int(total['earned_nanoton']))} TON with {total['jobs']:,} jobs",
        f"  today      {format_ton(int(found['today']['earned_nanoton']))} TON with "
        f"{found['today']['jobs']:,} jobs",
        f"  in transit {found['in_transit']['jobs']:,} jobs, at most "
        f"{format_ton(int(found['in_transit']['most_nanoton']))} TON",
        f"  refused    {found['refused_results']:,} results",
    ]
    lines += [
        f"    {_when(one['at_ms'])}  {one['job_id']}  {one['reason']}" for one in found["refused"]
    ]
    if found["rows"]:
        lines.append("")
    lines += [_row(row, by) for row in found["rows"]]
    if found["next"]:
        lines.append(f"  (there are more; {len(found['rows']):,} rows are shown)")
    if "receipts_saved" in found:
        lines.append(f"\n{found['receipts_saved']:,} receipts saved, each signature checked")
    return lines


def _row(row: dict[str, Any], by: By) -> str:
    tokens = f"{row['input_tokens']:,} in, {row['output_tokens']:,} out"
    money = f"{format_ton(int(row['earned_nanoton'])):>14} TON"
    if by is By.DAY:
        day = _EPOCH + timedelta(days=row["day"])
        return f"  {day.isoformat()}  {row['jobs']:>8,} jobs  {money}  {tokens}"
    if by is By.MODEL:
        name = row["model"] or (row["model_id"] or "unknown")[:16]
        return f"  {name:24}  {row['jobs']:>8,} jobs  {money}  {tokens}"
    name = row["model"] or (row["model_id"] or "unknown")[:16]
    return f"  {_when(row['at_ms'])}  {row['job_id']}  {name:16}  {money}  {tokens}"


def _when(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
