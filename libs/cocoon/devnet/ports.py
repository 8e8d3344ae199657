"""Free loopback ports for servers that start a while later."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection
from typing import Final

_BELOW_OUTGOING: Final = range(16_000, 32_000)  # systems give connections higher ones
_TRIES: Final = 32
_NEAR: Final = 20


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now and that no outgoing connection will be given."""
    for _ in range(_TRIES):
        port = _BELOW_OUTGOING[secrets.randbelow(len(_BELOW_OUTGOING))]
        if is_free(port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_port_after(port: int, but: Collection[int] = ()) -> int:
    """The next free port after this one, or any free one if none is near; never one of `but`."""
    for near in range(port + 1, min(port + _NEAR, 65_535) + 1):
        if near not in but and is_free(near):
            return near
    return free_port()


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def accepts(port: int, timeout_s: float = 0.2) -> bool:
    """Whether something listens on this port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s):
            return True
    except OSError:
        return False
