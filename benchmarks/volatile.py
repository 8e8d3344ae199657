"""`cocoon up` on a machine that forgets: the volatile arm, for measuring what durability costs.

    python -m benchmarks.volatile up ...        the network
    python -m benchmarks.volatile services.X    one of its processes

The product has no such switch. Nothing waits for the disk: Postgres commits without fsync, NATS
syncs as seldom as it does by default, and the provider's spool is not fsynced. Every event is
still written, chained, relayed and folded; only a power failure would tell the difference.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

POSTGRES = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
NATS_SYNC = "2m"  # the server's own default


def _forget(_: Any) -> None:
    """In place of fsync."""


def arrange() -> None:
    """Let networks of this process forget, and start their services through this module."""
    from cocoon.devnet import nats_server, network, postgres

    postgres._SETTINGS.update(POSTGRES)
    config, command = nats_server.NatsServer._config, network.Network._command

    def unsynced(self: nats_server.NatsServer) -> str:
        return config(self).replace('"always"', f'"{NATS_SYNC}"')

    def wrapped(self: network.Network, name: str) -> Sequence[str]:
        python, flag, module = command(self, name)
        return [python, flag, "benchmarks.volatile", module]

    nats_server.NatsServer._config = unsynced  # type: ignore[method-assign]
    network.Network._command = wrapped  # type: ignore[method-assign]


def _service(module: str) -> None:
    os.fsync = os.fdatasync = _forget  # type: ignore[assignment]
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "up":
        from cocoon.cli import main

        arrange()
        main()
    else:
        _service(sys.argv[1])
