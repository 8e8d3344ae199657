"""An operator turns a provider out by command, and takes it back."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.asking import get
from tests.support.network import LiveNetwork

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        with LiveNetwork(folder / "data", ("--providers", "2")) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listed(network: LiveNetwork) -> set[str]:
    found = get(network, "/v1/directory?model=skills-1").json()["providers"]
    return {entry["provider_id"] for entry in found}


def test_a_banned_provider_is_out_at_once_and_the_log_says_so(network: LiveNetwork) -> None:
    banned, other = sorted(listed(network))
    done = network.cli("ban", banned, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["banned"], told["revoked"], told["connections"]) == (True, 1, 1)
    deadline = time.monotonic() + 10
    while listed(network) != {other}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = network.cli("ban", banned)
    assert "0 attestations revoked" in again.stdout
    lifted = network.cli("ban", banned, "--lift")
    assert lifted.returncode == 0
    assert "may come in again" in lifted.stdout
    assert network.cli("replay", "--verify", "--decisions").returncode == 0
