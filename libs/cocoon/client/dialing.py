"""A TCP connection to the first of a name's addresses that answers (RFC 8305, "happy eyeballs").

uvloop's create_connection tries addresses one after another, each until the system gives up: a host
whose IPv6 leads nowhere would never come to IPv4.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from itertools import chain, zip_longest
from typing import Any, Final

HEAD_START_S: Final = 0.25  # of an address over the next one
MOST_ADDRESSES: Final = 8  # of a name
# A host that went without a word is noticed after about ten seconds, idle or with bytes unsent.
_DEAD_AFTER: Final = {
    "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000,
}  # fmt: skip


async def dial(host: str, port: int) -> socket.socket:
    """Raises OSError, the last address's, when none answers. The caller bounds the time."""
    left = deque(await _addresses(host, port))
    tries: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError("the name has no address")
    try:
        while left or tries:
            if left:
                tries.add(asyncio.create_task(_dial_one(*left.popleft())))
            done, tries = await asyncio.wait(
                tries, timeout=HEAD_START_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )  # fmt: skip
            for tried in done:
                failed = tried.exception()
                if failed is None:
                    tries |= done - {tried}
                    return tried.result()
                error = failed
        raise error
    finally:
        for tried in tries:
            tried.add_done_callback(_close_unused)
            tried.cancel()


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Families in turn, beginning with the one that the system prefers."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family: dict[int, list[tuple[int, Any]]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append((family, address))
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return [each for each in turns if each is not None][:MOST_ADDRESSES]


async def _dial_one(family: int, address: Any) -> socket.socket:
    line = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _DEAD_AFTER.items():
            if hasattr(socket, name):  # not every system has all of them
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        await asyncio.get_running_loop().sock_connect(line, address)
    except BaseException:
        line.close()
        raise
    return line


def _close_unused(tried: asyncio.Task[socket.socket]) -> None:
    if not tried.cancelled() and tried.exception() is None:
        tried.result().close()
