"""Connections to NATS: raw nats-py for hot routes, a FastStream broker for the rest.

Both reconnect for ever: nats-py that gives up starves the event loop. Errors are logged by name
only, because a bus error may carry a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats.errors

from cocoon.bus.client import BusClient
from cocoon.bus.keys import read_seed_file
from cocoon.kernel.errors import ConfigurationError, Unavailable

if TYPE_CHECKING:
    from faststream.nats import NatsBroker, NatsMessage

_log = logging.getLogger("cocoon.bus")
_RECONNECT_WAIT_S = 0.25
_PING_INTERVAL_S = 2  # the third unanswered one ends a line that died without a word: 4 to 6 s
_DRAIN_S = 5.0
_PENDING_BYTES = 16 * 1024 * 1024


def _options(name: str, inbox: str, on_closed: Callable[[], None] | None) -> dict[str, Any]:
    async def error_cb(error: Exception) -> None:
        # A refused subject is made of ids and tells the operator which rule is missing.
        refused = "permissions violation" in str(error).lower()
        _log.warning(
            "bus error",
            extra={"kind": type(error).__name__, "refused": str(error) if refused else ""},
        )

    async def disconnected_cb() -> None:
        _log.warning("bus disconnected", extra={"connection": name})

    async def reconnected_cb() -> None:
        _log.info("bus reconnected", extra={"connection": name})

    async def closed_cb() -> None:
        if on_closed is not None:
            on_closed()

    return {
        "name": name,
        "inbox_prefix": inbox,
        "error_cb": error_cb,
        "disconnected_cb": disconnected_cb,
        "reconnected_cb": reconnected_cb,
        "closed_cb": closed_cb,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": _RECONNECT_WAIT_S,
        "connect_timeout": 2,
        "ping_interval": _PING_INTERVAL_S,
        "max_outstanding_pings": 2,
        "pending_size": _PENDING_BYTES,
    }


async def connect(
    url: str,
    seed_file: Path | str | None,
    name: str,
    inbox_prefix: str,
    on_closed: Callable[[], None] | None = None,
    timeout_s: float = 10.0,
) -> BusClient:
    """Open a raw connection as the user of `seed_file` (None: a server without users).

    `on_closed` runs when the connection is closed for good, also by ourselves: let it stop the
    process. Raises Unavailable if the server cannot be reached, ConfigurationError if it refuses
    the user.
    """
    options = _options(name, inbox_prefix, on_closed)
    if seed_file is not None:
        options["nkeys_seed_str"] = read_seed_file(Path(seed_file)).decode()
    refused = asyncio.Event()
    log_error = options["error_cb"]

    async def error_cb(error: Exception) -> None:
        if "authorization violation" in str(error).lower():
            refused.set()
        await log_error(error)

    options["error_cb"] = error_cb
    client = BusClient()
    # nats-py would try the first connection for ever too: it is given up after a while.
    connecting = asyncio.create_task(client.connect(url, **options))
    refusal = asyncio.create_task(refused.wait())
    try:
        await asyncio.wait(
            (connecting, refusal), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if connecting.done():
            connecting.result()
            return client
    except (nats.errors.Error, OSError, TimeoutError):
        pass
    finally:
        refusal.cancel()
        if not client.is_connected:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await client.close()
    if refused.is_set():
        raise ConfigurationError(f"NATS does not know the user of {name}")
    raise Unavailable(f"NATS did not answer {name} within {timeout_s:g} s")


def broker(
    url: str,
    seed_file: Path | str | None,
    name: str,
    inbox_prefix: str,
    on_closed: Callable[[], None] | None = None,
) -> NatsBroker:
    """A FastStream broker that acknowledges nothing by itself and logs no message."""
    from faststream import AckPolicy
    from faststream.nats import NatsBroker
    from faststream.nats.security import NatsNKey

    options = _options(name, inbox_prefix, on_closed)
    security = None
    if seed_file is not None:
        security = NatsNKey.from_seed(read_seed_file(Path(seed_file)).decode())

    class Guarded(NatsBroker):
        """FastStream's broker over our client."""

        async def _connect(self) -> BusClient:
            connection = BusClient()
            await connection.connect(**self._connection_kwargs)
            self.config.connect(connection)
            return connection

    return Guarded(
        url,
        **options,
        security=security,
        ack_policy=AckPolicy.MANUAL,
        logger=None,
        apply_types=False,
        decoder=_undecoded,
        graceful_timeout=_DRAIN_S,
    )


async def _undecoded(message: NatsMessage) -> NatsMessage:
    return message  # handlers get the exact bytes that were signed, and their headers


async def close(nc: BusClient) -> None:
    """Flush and close, without raising if the server is away."""
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await nc.flush(timeout=1)
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await nc.close()


def is_connected(started: NatsBroker) -> bool:
    """Whether a started broker has its server now."""
    client = started._connection
    return client is not None and client.is_connected


async def stop(started: NatsBroker) -> None:
    """Stop a broker: let its handlers finish, then close, also while the server is away."""
    client = started._connection
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await started.stop()
    if client is not None and not client.is_closed:
        await client.close()
