"""`cocoon ban`: turn a provider and its machine out, or let them in again."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoon.cli.session import Data, Json, as_operator
from cocoon.kernel.errors import BadRequest

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork

_PROVIDER = re.compile(r"prov_[0-9a-f]{32}")


def ban(
    provider: Annotated[
        str, typer.Argument(help="The provider's id, as `./cocoon status` names it.")
    ],
    lift: Annotated[
        bool,
        typer.Option("--lift", help="Let it in again; its canaries' verdicts are forgotten, too."),
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Revoke a provider's attestation, end its connection, refuse it and its machine."""
    if _PROVIDER.fullmatch(provider) is None:
        raise BadRequest("a provider's id is prov_ and 32 digits, as `./cocoon status` names it")

    async def work(nc: Client, _: RunningNetwork, __: DataFolder) -> dict[str, Any]:
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects
        from cocoon.contracts.messages import BanRequest

        subject = subjects.attestation("platform", "ban")
        answer = await ask(nc, subject, BanRequest(provider_id=provider, lift=lift))
        found: dict[str, Any] = json.loads(answer)
        return found

    done = as_operator(data, work)
    if as_json:
        print(json.dumps({"provider_id": provider, **done}))
    elif lift:
        print(f"{provider} may come in again; its agent tries by itself")
    else:
        print(
            f"{provider} is banned: {done['revoked']} attestations revoked, "
            f"{done['connections']} connections ended; --lift takes it back"
        )
