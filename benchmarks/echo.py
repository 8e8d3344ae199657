"""The other end of a message or a request that does nothing: `python -m benchmarks.echo`.

nats URL: answers each message on `echo` with its bytes, through our client. http PORT: answers each
POST with its body, by uvicorn as the gateway and the sidecar run it. Prints "ready".
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
import uvloop
from nats.aio.msg import Msg

from cocoon.bus.connection import connect

SUBJECT = "echo"
_Message = MutableMapping[str, Any]


async def _nats(url: str) -> None:
    nc = await connect(url, None, "echo", "_INBOX.echo")

    def answer(message: Msg) -> None:
        asyncio.ensure_future(nc.publish(message.reply, message.data))  # noqa: RUF006 - it is short

    await nc.subscribe_direct(SUBJECT, answer)
    await nc.flush()
    print("ready", flush=True)
    await asyncio.get_running_loop().create_future()


async def _app(
    scope: _Message,
    receive: Callable[[], Awaitable[_Message]],
    send: Callable[[_Message], Awaitable[None]],
) -> None:
    body, more = b"", True
    while more:
        part = await receive()
        body, more = body + part.get("body", b""), part.get("more_body", False)
    size = str(len(body)).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]}
    )
    await send({"type": "http.response.body", "body": body})


def _http(port: int) -> None:
    uvicorn.run(
        _app, host="127.0.0.1", port=port, log_level="critical", access_log=False, loop="uvloop",
        http="httptools", lifespan="off", server_header=False, date_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "nats":
        uvloop.run(_nats(sys.argv[2]))
    else:
        _http(int(sys.argv[2]))
