"""kill -9 of every process of a working network: no job is lost, nothing is charged wrongly."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocoon.devnet import unprivileged
from cocoon.devnet.postgres import PostgresServer, install_folder
from tests.support.canaries import files_under, find_canaries
from tests.support.chaos_world import ChaosWorld, chaos_world, trials

pytestmark = [pytest.mark.network, pytest.mark.timeout(120 * trials())]
PROCESSES = (
    "gateway", "matcher", "billing", "attestation", "provider", "nats", "postgres", "sidecar",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosWorld]:
    with chaos_world(tmp_path_factory.mktemp("killed")) as found:
        yield found


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_killed_process_breaks_no_invariant(world: ChaosWorld, name: str) -> None:
    for _ in range(trials()):
        trial = await world.kill_under_load(name)
        assert trial.violations == []


async def test_postgres_stopped_at_once_is_started_again_and_nothing_is_lost(
    world: ChaosWorld,
) -> None:
    server = PostgresServer(world.network.folder.postgres)

    for _ in range(trials()):
        trial = await world.end_under_load(
            "postgres", "pg_ctl stop -m immediate", lambda: pg_ctl_immediate(server.cluster_dir)
        )
        assert trial.violations == []


def pg_ctl_immediate(cluster: Path) -> None:
    """As the cluster's own account: pg_ctl refuses to run as root.

    It does not wait for the end: the supervisor is quicker than its look.
    """
    account = unprivileged.account()
    install = install_folder()
    subprocess.run(
        [str(install / "bin" / "pg_ctl"), "stop", "-D", str(cluster), "-m", "immediate", "-W"],
        user=account.pw_uid if account else None, group=account.pw_gid if account else None,
        extra_groups=[] if account else None, check=True, capture_output=True, cwd="/",
        timeout=30, env={"LD_LIBRARY_PATH": str(install / "lib"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_the_search_for_plaintext_sees_what_the_files_hold(world: ChaosWorld) -> None:
    known = world.network.running.account_id.encode()

    found = find_canaries(files_under(world.network.data), [known])

    for part in ("/postgres/cluster/base", "/postgres/cluster/pg_wal", "/nats/jetstream"):
        assert any(part in place for place in found)
