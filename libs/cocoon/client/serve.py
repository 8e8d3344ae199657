"""Run the sidecar as a process: bind loopback, say when it is ready, stop on a signal."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from cocoon.client.settings import SidecarSettings
from cocoon.client.sidecar import Sidecar
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import ConfigurationError
from cocoon.telemetry.logs import configure_logs
from cocoon.telemetry.tracing import configure_tracing

GRACE_S = 5.0
_CUT_S = 1.0  # after the grace, for callers to be told
MAX_CONNECTIONS = 512
_GC_OBJECTS = 20_000
OPEN_WARNING = (
    "The open tier is on: its providers have no TEE, and who owns such a machine can read the "
    "prompts and answers that it gets. Leave it out of the tiers to use protected ones only."
)


class _Server(uvicorn.Server):
    """Says once that it accepts connections. At its end it tells whoever still reads an answer."""

    def __init__(
        self, config: uvicorn.Config, sidecar: Sidecar, grace_s: float,
        on_ready: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._sidecar, self._grace_s, self._on_ready = sidecar, grace_s, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # what was loaded until now stays: the garbage collector need not look at it again,
            # and at what a request leaves behind seldom: little of it is in cycles
            gc.collect()
            gc.freeze()
            gc.set_threshold(_GC_OBJECTS, 20, 20)
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._grace_s)
        await self._sidecar.end_answers()


def announce(base_url: str) -> None:
    """Write the one line that tells a parent process where the sidecar is."""
    sys.stdout.write(json.dumps({"ready": "sidecar", "base_url": base_url}) + "\n")
    sys.stdout.flush()


def run_sidecar(
    settings: SidecarSettings,
    on_ready: Callable[[str], None] = announce,
    *,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; running answers get `grace_s` to come to their end.

    `on_ready` gets the base URL to give an OpenAI client.
    Raises ConfigurationError when the port is taken or the network cannot be opened.
    """
    configure_logs("sidecar", settings.log_level.lower())
    if settings.tiers is not None and Assurance.OPEN in settings.tiers:
        sys.stderr.write(OPEN_WARNING + "\n")
        sys.stderr.flush()
    listening = _bind(settings.listen_host, settings.listen_port)
    host = f"[{settings.listen_host}]" if ":" in settings.listen_host else settings.listen_host
    base_url = f"http://{host}:{listening.getsockname()[1]}/v1"
    sidecar = Sidecar(settings.network_options())
    config = uvicorn.Config(
        sidecar,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=grace_s + _CUT_S,  # type: ignore[arg-type]  # no whole number needed
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config, sidecar, grace_s, lambda: on_ready(base_url))
    # uvicorn hands a signal on to these when it has stopped: that must not end us before we return
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if name is not signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:  # nohup
            signal.signal(name, server.handle_exit)
    # why the network was not opened is raised below; uvicorn's own lines of it say less
    logging.getLogger("uvicorn.error").addFilter(lambda _: sidecar.failure is None)
    stop_tracing = configure_tracing("sidecar", settings.otlp_endpoint)
    try:
        with suppress(SystemExit):  # a start that failed; its reason follows
            server.run(sockets=[listening])
    finally:
        listening.close()
        stop_tracing()
    if sidecar.failure is not None:
        raise sidecar.failure
    if not server.started:
        raise ConfigurationError("the sidecar could not start; its log says why")


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            f"port {port} on {host} cannot be used ({error.strerror}); name another one"
        ) from None
    return listening
