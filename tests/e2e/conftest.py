"""One network of real processes for the whole folder, with a real collector of its traces."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocoon.client import NetworkOptions
from tests.support.extra_processes import Connected, Gateway, connected, gateway
from tests.support.network import LiveNetwork
from tests.support.otlp_collector import Collector, collecting
from tests.support.ways import NAMES, Way, way


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="session")
def network(collector: Collector) -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        with LiveNetwork(folder / "data", ("--otlp", collector.url)) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def options(network: LiveNetwork) -> NetworkOptions:
    """What a program in this process needs to reach the network."""
    return NetworkOptions(network.gateway, network.folder.trust, api_key=network.api_key)


@pytest.fixture(scope="session", params=NAMES)
def client(
    request: pytest.FixtureRequest, network: LiveNetwork, options: NetworkOptions
) -> Iterator[Way]:
    """Each of the four stock clients in turn."""
    with way(request.param, network.sidecar, options) as found:
        yield found


@pytest.fixture(scope="session")
def sidecar(network: LiveNetwork, options: NetworkOptions) -> Iterator[Way]:
    """The stock client through the network's own sidecar."""
    with way("sync sidecar", network.sidecar, options) as found:
        yield found


@pytest.fixture(scope="session")
def keyless(network: LiveNetwork) -> Iterator[Connected]:
    """A `cocoon connect` without a key: its callers bring their own."""
    with connected(network) as found:
        yield found


@pytest.fixture(scope="session")
def narrow_gateway(network: LiveNetwork) -> Iterator[Gateway]:
    """A second gateway that lets a key have one job at a time."""
    with gateway(network, MAX_JOBS_PER_KEY="1") as found:
        yield found


@pytest.fixture(scope="session")
def hasty_gateway(network: LiveNetwork) -> Iterator[Gateway]:
    """A second gateway that waits a millisecond for a first byte."""
    with gateway(network, FIRST_BYTE_TIMEOUT_S="0.001") as found:
        yield found
