"""Connections to NATS: raw nats-py for hot routes, a FastStream broker for the rest.

Both reconnect for ever: nats-py that gives up starves the event loop. Errors are logged by name
only, because a bus error may carry a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
_CONNECT_S = 3  # longer than the server waits for the answer who this is
_KINDS = ("nats", "tls", "ws", "wss")


def _options(name: str, inbox: str, on_closed: Callable[[], None] | None) -> dict[str, Any]:
    unreachable: set[str] = set()  # told since the last connection: it tries four times a second

    async def error_cb(error: Exception) -> None:
        # A refused subject is made of ids and tells the operator which rule is missing.
        refused = "permissions violation" in str(error).lower()
        kind = type(error).__name__
        if isinstance(error, OSError):
            if kind in unreachable:
                return
            unreachable.add(kind)
        _log.warning("bus error", extra={"kind": kind, "refused": str(error) if refused else ""})

    async def disconnected_cb() -> None:
        _log.warning("bus disconnected", extra={"connection": name})

    async def reconnected_cb() -> None:
        unreachable.clear()
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
        "connect_timeout": _CONNECT_S,
        "ping_interval": _PING_INTERVAL_S,
        "max_outstanding_pings": 2,
        "pending_size": _PENDING_BYTES,
    }


async def connect(
    url: str | Sequence[str],
    seed_file: Path | str | None,
    name: str,
    inbox_prefix: str,
    on_closed: Callable[[], None] | None = None,
    timeout_s: float = 10.0,
    ca_file: Path | str | None = None,
) -> BusClient:
    """Open a raw connection as the user of `seed_file` (None: a server without users).

    `url`: one address or several of one kind (nats, tls, ws, wss); `ca_file`: the authority behind
    their certificates, if it is not a public one. `on_closed` runs when the connection is closed
    for good, also by ourselves: let it stop the process. Raises Unavailable if no server can be
    reached, ConfigurationError if one refuses the user or shows a certificate of another authority.
    """
    urls = addresses(url)
    options = _options(name, inbox_prefix, on_closed)
    options.update(_encryption(urls, ca_file))
    if seed_file is not None:
        options["nkeys_seed_str"] = read_seed_file(Path(seed_file)).decode()
    attempts = _Attempts(name, urls, options["error_cb"])
    options["error_cb"] = attempts.error_cb
    client = BusClient()
    # nats-py would try the first connection for ever too: it is given up after a while.
    connecting = asyncio.create_task(client.connect(urls, **options))
    hopeless = asyncio.create_task(attempts.hopeless.wait())
    try:
        await asyncio.wait(
            (connecting, hopeless), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if connecting.done():
            connecting.result()
            return client
    except (nats.errors.Error, OSError, TimeoutError):
        pass
    finally:
        hopeless.cancel()
        if not client.is_connected:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await client.close()
    raise attempts.error(timeout_s)


def addresses(url: str | Sequence[str]) -> list[str]:
    """One address, or several with commas between them or as a list; all of one kind.

    Raises ConfigurationError for what is not an address of a bus.
    """
    found = url.split(",") if isinstance(url, str) else list(url)
    urls = [item.strip() for item in found if item.strip()]
    kinds = set()
    for item in urls:
        try:
            parts = urlsplit(item)
            usable = parts.scheme in _KINDS and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigurationError(
                f"{item} is not an address of a bus; write tls://HOST:PORT or wss://HOST:PORT "
                "(nats:// and ws:// on one machine)"
            )
        kinds.add(parts.scheme)
    if len(kinds) != 1:
        raise ConfigurationError(
            "name at least one address of the bus, and only addresses of one kind (nats, tls, ws "
            "or wss)"
        )
    return urls


def _encryption(urls: Sequence[str], ca_file: Path | str | None) -> dict[str, Any]:
    """Nothing is said before the line is encrypted, so nobody on the way can talk us out of it."""
    scheme = urlsplit(urls[0]).scheme
    if scheme not in ("tls", "wss"):
        return {}
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except (OSError, ssl.SSLError):
        raise ConfigurationError(
            f"the bus's certificate authority {ca_file} cannot be read; it is a file with a "
            "certificate in PEM"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return {"tls": context, "tls_handshake_first": scheme == "tls"}


class _Attempts:
    """What became of the attempts to connect: why, if all failed, and whether another may help."""

    def __init__(
        self, name: str, urls: Sequence[str], log_error: Callable[[Exception], Awaitable[None]]
    ) -> None:
        self._name, self._where, self._log_error = name, ", ".join(urls), log_error
        self._refused = False
        self._full = False
        self._untrusted = ""
        self.hopeless = asyncio.Event()

    async def error_cb(self, error: Exception) -> None:
        self._untrusted = self._untrusted or _untrusted(error)
        if self._untrusted:
            self.hopeless.set()
        if "maximum" in str(error).lower():
            self._full = True
        if "authorization" in str(error).lower():
            self._refused = True  # and tried again: who answers for newcomers may be starting
        await self._log_error(error)

    def error(self, timeout_s: float) -> ConfigurationError | Unavailable:
        if self._untrusted:
            return ConfigurationError(
                f"the bus at {self._where} shows a certificate that is not trusted "
                f"({self._untrusted}); name the network's own authority (ca_file), or another "
                "address"
            )
        if self._full:
            return Unavailable(
                f"the bus takes no more connections of {self._name} now; end the others that use "
                "its key, or try again later"
            )
        if self._refused:
            return ConfigurationError(
                f"NATS does not know the user of {self._name}, or keeps it out, for "
                f"{timeout_s:g} s now: the network may be down, the line not encrypted (tls:// or "
                "wss://), or the key used too often; the server's log says which"
            )
        return Unavailable(
            f"NATS did not answer {self._name} at {self._where} within {timeout_s:g} s; is the "
            "address right?"
        )


def _untrusted(error: BaseException | None) -> str:
    """What is wrong with the server's certificate, or nothing."""
    while error is not None:
        told = getattr(error, "verify_message", None)
        if isinstance(error, ssl.SSLCertVerificationError) and told:
            return str(told)
        error = error.__cause__  # aiohttp puts an error of its own before it
    return ""


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
