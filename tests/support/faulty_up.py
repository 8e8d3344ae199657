"""`cocoon up` with a test's hands on its processes: `python -m tests.support.faulty_up FOLDER up`.

Nothing of the product knows of it: it puts wrappers around the commands and addresses that the
supervisor gives to its children. FOLDER holds what the test wants and what the wrappers tell:

links.json      {"gateway": {"nats": PORT, "postgres": PORT}, "sidecar": {"gateway": PORT}}: who
                reaches which server through a proxy of the test's
servers.json    the servers' own ports, for the proxies
armed-NAME      see named_points
clock-NAME      milliseconds by which the wall clock of a provider is wrong
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from cocoon.cli import main
from cocoon.devnet import supervising
from cocoon.devnet.network import Network

LINKS, SERVERS = "links.json", "servers.json"


def wrap(folder: Path) -> None:
    """Let every service run under `named_points` and reach its servers by the links' ports."""
    command, environment = Network._command, Network._environment
    links = json.loads((folder / LINKS).read_text())

    def _command(self: Network, name: str) -> Sequence[str]:
        plain = command(self, name)
        if name == "sidecar":
            return plain
        return [sys.executable, "-m", "tests.support.named_points", str(folder), name, plain[-1]]

    def _environment(self: Network, name: str) -> dict[str, str]:
        values = environment(self, name)
        assert self._nats is not None
        ports = {
            "nats": self._nats.port, "postgres": self._postgres.port,
            "gateway": self._gateway_port,
        }  # fmt: skip
        (folder / SERVERS).write_text(json.dumps(ports))
        return {key: _linked(folder, name, key, value, links) for key, value in values.items()}

    Network._command, Network._environment = _command, _environment  # type: ignore[method-assign]
    supervising.RESTARTS = 10_000  # faults come by the dozen


def _linked(folder: Path, name: str, key: str, value: str, links: dict[str, dict[str, int]]) -> str:
    own = links.get(name, {})
    if key.endswith("NATS_URL") and "nats" in own:
        return f"nats://127.0.0.1:{own['nats']}"
    if key.endswith("GATEWAY_URL") and "gateway" in own:
        return f"http://127.0.0.1:{own['gateway']}"
    if key.endswith("POSTGRES_DSN_FILE") and "postgres" in own:
        dsn = Path(value).read_text()
        there = f"@127.0.0.1:{urlsplit(dsn).port}/"
        assert there in dsn
        copy = folder / f"dsn-{name}"
        copy.touch(mode=0o600)
        copy.write_text(re.sub(re.escape(there), f"@127.0.0.1:{own['postgres']}/", dsn))
        return str(copy)
    return value


if __name__ == "__main__":
    wrap(Path(sys.argv.pop(1)))
    main()
