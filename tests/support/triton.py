"""A real Triton server for tests; skipped, with the reason, where it cannot be installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cocoon.devnet.triton_server import TritonServer, install
from cocoon.kernel.errors import ConfigurationError


def need_triton() -> None:
    """Install the server once, or skip saying why."""
    try:
        install(lambda _: None)
    except ConfigurationError as error:
        pytest.skip(f"no Triton server here: {error.message}")


@contextmanager
def triton_server(folder: Path) -> Iterator[TritonServer]:
    need_triton()
    server = TritonServer(folder / "triton.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def triton_metric(metrics_url: str, name: str) -> float:
    """One sample of the server's metrics, e.g. `cocoon_engine_running{model="skills-1"}`."""
    text = httpx.get(f"{metrics_url}/metrics", trust_env=False).text
    found = re.search(rf"^{re.escape(name)} ([0-9.e+]+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])
