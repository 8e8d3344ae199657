"""Connections to NATS: raw nats-py for hot routes, a FastStream broker for the rest.

Both reconnect for ever: nats-py that gives up starves the event loop. Errors are logged by name
only, because a bus error may carry a message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import nats.errors

from cocoon.bus.keys import read_seed_file
from cocoon.kernel.errors import ConfigurationError, Unavailable

if TYPE_CHECKING:
    from faststream.nats import NatsBroker
    from nats.aio.client import Client

_log = logging.getLogger("cocoon.bus")
_RECONNECT_WAIT_S = 0.25
_PING_INTERVAL_S = 5
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
) -> Client:
    """Open a raw connection as the user of `seed_file` (None: a server without users).

    `on_closed` runs when the connection is closed for good, also by ourselves: let it stop the
    process. Raises Unavailable if the server cannot be reached, ConfigurationError if it refuses
    the user.
    """
    options = _options(name, inbox_prefix, on_closed)
    if seed_file is not None:
        options["nkeys_seed_str"] = read_seed_file(Path(seed_file)).decode()
    try:
        # The first connection is tried a few times only; after it nats-py reconnects for ever.
        return await nats.connect(url, **{**options, "allow_reconnect": True})
    except (nats.errors.AuthorizationError, nats.errors.Error) as error:
        if "authorization" in str(error).lower():
            raise ConfigurationError(f"NATS does not know the user of {name}") from None
        raise Unavailable(f"NATS cannot be reached ({type(error).__name__})") from None
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"NATS cannot be reached ({type(error).__name__})") from None


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
    return NatsBroker(
        url,
        **options,
        security=security,
        ack_policy=AckPolicy.MANUAL,
        logger=None,
        apply_types=False,
    )


async def close(nc: Client) -> None:
    """Flush and close, without raising if the server is away."""
    import asyncio
    import contextlib

    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await asyncio.wait_for(nc.flush(timeout=1), 2)
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await nc.close()
