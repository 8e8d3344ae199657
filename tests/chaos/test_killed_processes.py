"""kill -9 of every process of a working network: no job is lost, nothing is charged wrongly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.canaries import files_under, find_canaries
from tests.support.chaos_world import ChaosWorld, chaos_world

pytestmark = pytest.mark.network
PROCESSES = (
    "gateway", "matcher", "billing", "attestation", "provider", "nats", "postgres", "sidecar",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosWorld]:
    with chaos_world(tmp_path_factory.mktemp("killed")) as found:
        yield found


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_killed_process_breaks_no_invariant(world: ChaosWorld, name: str) -> None:
    trial = await world.kill_under_load(name)

    assert trial.violations == []


def test_the_search_for_plaintext_sees_what_the_files_hold(world: ChaosWorld) -> None:
    known = world.network.running.account_id.encode()

    found = find_canaries(files_under(world.network.data), [known])

    for part in ("/postgres/cluster/base", "/postgres/cluster/pg_wal", "/nats/jetstream"):
        assert any(part in place for place in found)
