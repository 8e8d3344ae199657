"""More real processes beside a running network: a sidecar as a user starts it, another gateway."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.network import ROOT, LiveNetwork


@dataclass(frozen=True)
class Connected:
    """A `cocoon connect` that runs: its base URL and the file with all that it said."""

    base_url: str
    output: Path


@dataclass(frozen=True)
class Gateway:
    url: str


@contextmanager
def connected(network: LiveNetwork, *options: str, gateway_url: str = "") -> Iterator[Connected]:
    """Run `cocoon connect` on any port until the block ends."""
    output = network.data.with_name(f"connect-{os.urandom(4).hex()}.stderr")
    command = [
        sys.executable, "-m", "cocoon.cli", "connect", "--port", "0",
        "--gateway", gateway_url or network.gateway, "--trust", str(network.folder.trust),
        *options,
    ]  # fmt: skip
    with (
        output.open("wb") as out,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        as process,
    ):  # fmt: skip
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            out.write(line)
            found = re.search(rb"http://\S+", line)
            assert found, (line + process.stderr.read(2000)).decode()
            yield Connected(found[0].decode(), output)
        finally:
            process.terminate()
            _, rest = process.communicate(timeout=20)
            out.write(rest)


@contextmanager
def gateway(network: LiveNetwork, **settings: str) -> Iterator[Gateway]:
    """Run one more gateway of this network with these COCOON_GATEWAY_ settings."""
    folder = network.folder
    own = {
        "NATS_URL": network.running.nats_url,
        "NATS_SEED_FILE": str(folder.seed("gateway")),
        "POSTGRES_DSN_FILE": str(folder.dsn("gateway")),
        **settings,
    }
    environment = {**os.environ, **{f"COCOON_GATEWAY_{k}": v for k, v in own.items()}}
    log = folder.logs / f"gateway-{os.urandom(4).hex()}.log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "services.gateway"], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=stderr,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()[-2000:]
            ready = json.loads(line)
            yield Gateway(f"http://127.0.0.1:{ready['port']}")
        finally:
            process.terminate()
            process.wait(40)
