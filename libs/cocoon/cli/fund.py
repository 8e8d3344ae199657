"""`./cocoon fund`: dev credit for an account. (Deposits of TON come with the settlement.)"""

from __future__ import annotations

import json
import secrets
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.balance import money
from cocoon.cli.session import Data, Json, as_operator
from cocoon.kernel.errors import BadRequest, Transient
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
    ) -> tuple[bool, dict[str, str] | None]:
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects
        from cocoon.contracts.messages import BalanceRequest, CreditRequest
        from cocoon.devnet.accounts import shard_of

        shard = shard_of(account, running.shards[1:])
        request = CreditRequest(
            account_id=account, amount_nanoton=amount_nanoton,
            reference=reference or f"cli-{secrets.token_hex(8)}",
        )  # fmt: skip
        done = json.loads(await ask(nc, subjects.billing(shard, "credit_deposit"), request))
        posted = BalanceRequest(account_id=account, posted=done["position"])
        try:
            found = json.loads(await ask(nc, subjects.billing(shard, "balance"), posted))
        except Transient:
            found = None  # it is credited all the same
        return not done["repeated"], found

    first, found = as_operator(data, work)
    now = f"; it has {money(found)}" if found else ""
    if not found:
        print("cocoon: the new balance is not known yet; see `./cocoon balance`", file=sys.stderr)
    if as_json:
        print(json.dumps(found or {"account_id": account}))
    elif first:
        print(f"{account} was credited {format_ton(amount_nanoton)} TON{now}")
    else:
        print(f"{account} had been credited under this reference before; nothing changed{now}")
