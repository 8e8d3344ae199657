"""`cocoon fund`: dev credit for an account. (Deposits of TON come with the settlement.)"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, Json, as_operator
from cocoon.kernel.errors import BadRequest
from cocoon.kernel.money import format_ton, parse_ton

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork


def fund(
    account: Annotated[str, typer.Argument(help="The account, acct_...")],
    ton: Annotated[str, typer.Argument(help="How much, in TON: 1 or 0.25.")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="One credit per reference, however often it is sent (default: a new one)."
        ),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Credit an account of this development network."""
    try:
        amount_nanoton = parse_ton(ton)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if not amount_nanoton:
        raise BadRequest("an amount is more than nothing; write it like 1 or 0.25")

    async def work(
        nc: Client, running: RunningNetwork, _: DataFolder
    ) -> tuple[bool, dict[str, str]]:
        from cocoon.devnet.accounts import balance
        from cocoon.devnet.accounts import fund as credit

        shards = running.shards[1:]
        named = reference or f"cli-{secrets.token_hex(8)}"
        first = await credit(nc, account, amount_nanoton, named, shards)
        return first, await balance(nc, account, shards)

    first, found = as_operator(data, work)
    if as_json:
        print(json.dumps(found))
    elif first:
        print(f"{account} was credited {format_ton(amount_nanoton)} TON")
    else:
        print(f"{account} had been credited under this reference before; nothing changed")
