"""`./cocoon balance`: what an account can spend and what its running jobs hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, Json, as_operator
from cocoon.kernel.errors import NotFound
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork


def balance(
    account: Annotated[
        str | None, typer.Argument(help="The account, acct_... (default: the network's first).")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what an account has free and what its running jobs hold."""

    async def work(nc: Client, running: RunningNetwork, _: DataFolder) -> dict[str, str]:
        from cocoon.devnet.accounts import balance as ask_balance
        from cocoon.devnet.accounts import is_open

        named, shards = account or running.account_id, running.shards[1:]
        if not await is_open(nc, named, shards):
            raise NotFound(f"there is no account {named}", code="account_not_found")
        return await ask_balance(nc, named, shards)

    found = as_operator(data, work)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['account_id']} has {money(found)}")


def money(found: dict[str, str]) -> str:
    """A balance as people read it."""
    available, held = int(found["available_nanoton"]), int(found["held_nanoton"])
    return f"{format_ton(available)} TON free, {format_ton(held)} TON held by running jobs"
