"""`./cocoon keys`: create, list and revoke API keys."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.session import Data, Json, as_operator, data_hint
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

    async def work(
        nc: Client, running: RunningNetwork, folder: DataFolder
    ) -> tuple[NewKey, RunningNetwork, DataFolder]:
        from cocoon.devnet.accounts import create_key, is_open, new_account_id, open_account

        account_id = account or new_account_id()
        if account is None:
            await open_account(nc, account_id, running.shards[1:])
        elif not await is_open(nc, account_id, running.shards[1:]):
            raise NotFound(
                f"there is no account {account_id}; without --account the key gets a new one",
                code="account_not_found",
            )
        return await create_key(nc, account_id, label[:64]), running, folder

    key, running, folder = as_operator(data, work)
    if as_json:
        value = {"api_key_id": key.api_key_id, "account_id": key.account_id, "api_key": key.text}
        print(json.dumps(value))
        return
    print(f"{key.text}\n\n  id {key.api_key_id}, account {key.account_id}")
    print("  This is the only time it is shown.")
    print(
        f"  Use it as the api_key at the sidecar, {running.sidecar_url}, or in a sidecar of your "
        f"own:\n  ./cocoon connect --gateway {running.gateway_url} --key KEY "
        f"--trust {shlex.quote(str(folder.trust))} --port 0"
    )
    if account is None:
        print(f"  Add funds with:\n  ./cocoon fund {key.account_id} 1{data_hint(folder)}")


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
    print(_row({"api_key_id": "KEY", "account_id": "ACCOUNT", "label": "NAME"}, "MADE", "REVOKED"))
    for key in found["keys"]:
        print(_row(key, _time(key["created_ms"]), _time(key["revoked_ms"])))


def _row(key: dict[str, Any], made: str, revoked: str) -> str:
    columns = f"{key['api_key_id']:16}  {key['account_id']:21}  {made:20}  {revoked:20}"
    return f"{columns}  {key['label']}".rstrip()


def _time(unix_ms: int | None) -> str:
    return "-" if unix_ms is None else f"{datetime.fromtimestamp(unix_ms // 1000, UTC):%FT%TZ}"


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

    done = json.loads(as_operator(data, work))
    if done["revoked_before"]:
        print(f"{api_key_id} was revoked already, at {_time(done['revoked_ms'])}")
    else:
        print(f"{api_key_id} is revoked")
