"""`cocoon keys`: create, list and revoke API keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, Json, as_operator, data_hint, folder_of
from cocoon.kernel.errors import NotFound

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.accounts import NewKey
    from cocoon.devnet.folder import DataFolder, RunningNetwork

app = typer.Typer(
    help="Create, list and revoke API keys.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("create")
def create(
    label: Annotated[str, typer.Option("--name", help="A name for you to know it by.")] = "",
    account: Annotated[
        str | None, typer.Option(help="The account that pays (default: a new one, without funds).")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a key. Its text is shown once and kept nowhere."""

    async def work(nc: Client, running: RunningNetwork, _: DataFolder) -> NewKey:
        from cocoon.devnet.accounts import create_key, is_open, new_account_id, open_account

        account_id = account or new_account_id()
        if account is None:
            await open_account(nc, account_id, running.shards[1:])
        elif not await is_open(nc, account_id, running.shards[1:]):
            raise NotFound(
                f"there is no account {account_id}; without --account the key gets a new one",
                code="account_not_found",
            )
        return await create_key(nc, account_id, label[:64])

    key = as_operator(data, work)
    if as_json:
        value = {"api_key_id": key.api_key_id, "account_id": key.account_id, "api_key": key.text}
        print(json.dumps(value))
        return
    print(f"{key.text}\n\n  id {key.api_key_id}, account {key.account_id}")
    if account is not None:
        print("  This is the only time it is shown.")
        return
    print("  This is the only time it is shown. Add funds with:")
    print(f"  ./cocoon fund {key.account_id} 1{data_hint(folder_of(data))}")


@app.command("list")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """List keys by id: account, name, when made, when revoked. Never their text."""

    async def work(nc: Client, _: RunningNetwork, __: DataFolder) -> str:
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects

        return await ask(nc, subjects.gateway_keys("list"))

    answer = as_operator(data, work)
    if as_json:
        print(answer)
        return
    found = json.loads(answer)
    for key in found["keys"] if isinstance(found, dict) else found:
        state = "revoked" if key.get("revoked_ms") else "active"
        print(f"{key['api_key_id']}  {key['account_id']}  {state:7}  {key.get('label', '')}")


@app.command("revoke")
def revoke(
    api_key_id: Annotated[str, typer.Argument(help="The key's id, key_...")], data: Data = None
) -> None:
    """Revoke a key: it is refused from now on."""

    async def work(nc: Client, _: RunningNetwork, __: DataFolder) -> str:
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects
        from cocoon.contracts.messages import RevokeKeyRequest

        return await ask(
            nc, subjects.gateway_keys("revoke"), RevokeKeyRequest(api_key_id=api_key_id)
        )

    as_operator(data, work)
    print(f"{api_key_id} is revoked")
