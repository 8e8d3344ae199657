"""`cocoon unpark`: post the events that billing had put aside, once their cause is mended."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from cocoon.cli.session import Data, Json, as_operator
from cocoon.kernel.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork

# ledger/<shard> too: whatever cannot be read stands aside
_STREAM = re.compile(r"(job|account|ledger)/[\w.-]{1,128}", re.ASCII)


def unpark(
    shard: Annotated[int, typer.Argument(help="The shard that `./cocoon status` names.")],
    stream: Annotated[str, typer.Argument(help="The stream: job/<id> or account/<id>.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Post a parked stream in order. What still cannot be posted stays, with nothing changed."""

    if _STREAM.fullmatch(stream) is None:
        raise BadRequest(
            "a stream is job/<id> or account/<id>, as `./cocoon status` names what is PARKED"
        )

    async def work(nc: Client, running: RunningNetwork, _: DataFolder) -> int:
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects
        from cocoon.contracts.messages import UnparkRequest

        if shard not in running.shards[1:]:
            accounts = ", ".join(str(number) for number in running.shards[1:])
            raise NotFound(f"there is no account shard {shard}; this network has {accounts}")
        subject = subjects.billing(shard, "unpark")
        answer = json.loads(await ask(nc, subject, UnparkRequest(stream=stream)))
        return int(answer["events"])

    events = as_operator(data, work)
    if as_json:
        print(json.dumps({"shard": shard, "stream": stream, "events": events}))
    elif events:
        print(f"{stream}: {events} posted, nothing of it stands aside now")
    else:
        print(f"nothing of {stream} is parked on shard {shard}; nothing changed")
