"""`cocoon provider` on a running network, as the provider that serves there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cocoon.sealing.receipt import RECEIPT_BYTES, Receipt
from tests.support.asking import ask
from tests.support.network import ROOT, LiveNetwork
from tests.support.provider_file import file_of
from tests.support.ways import Way

pytestmark = pytest.mark.network


def provider(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cocoon.cli", "provider", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def told(*arguments: str) -> Any:
    done = provider(*arguments, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def config(network: LiveNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the network's own provider."""
    place = tmp_path_factory.mktemp("provider") / "provider.toml"
    return file_of(network, "provider", place)


@pytest.fixture(scope="module")
def jobs(sidecar: Way) -> int:
    """So many jobs ended before anybody looks."""
    for number in range(4):
        sidecar.complete(**ask(f"Count from 1 to {number + 3}"))
    return 4


def settled(config: Path, jobs: int) -> dict[str, Any]:
    """Earnings once the books hold the jobs."""
    deadline = time.monotonic() + 20
    while True:
        found: dict[str, Any] = told("earnings", "--config", str(config))
        if found["total"]["jobs"] >= jobs and found["in_transit"]["jobs"] == 0:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_earnings_by_day_model_and_job_are_one_sum_and_the_ledgers(
    config: Path, network: LiveNetwork, jobs: int
) -> None:
    found = settled(config, jobs)
    total = int(found["total"]["earned_nanoton"])
    assert total > 0
    assert total == int(found["balance_nanoton"]) == int(found["today"]["earned_nanoton"])
    for by in ("day", "model", "job"):
        rows = told("earnings", "--config", str(config), "--by", by)["rows"]
        assert sum(int(row["earned_nanoton"]) for row in rows) == total
    assert network.cli("replay", "--verify").returncode == 0
    shown = provider("earnings", "--config", str(config), "--by", "model")
    assert "skills-1" in shown.stdout


def test_receipts_are_saved_whole_and_name_their_jobs(
    config: Path, jobs: int, tmp_path: Path
) -> None:
    settled(config, jobs)
    found = told("earnings", "--config", str(config), "--receipts", str(tmp_path / "receipts"))
    saved = sorted((tmp_path / "receipts").glob("*.receipt"))
    assert len(saved) == found["receipts_saved"] == found["total"]["jobs"]
    names = {row["job_id"] for row in found["rows"]}
    for path in saved:
        raw = path.read_bytes()
        assert len(raw) == RECEIPT_BYTES
        assert Receipt.decode(raw).job_id.hex() in names
    assert not any("receipt" in row for row in found["rows"])


def test_why_tells_how_the_network_sees_it(config: Path, jobs: int) -> None:
    found = told("why", "--config", str(config))
    assert found["standing"]["attested"]
    assert found["standing"]["listed"]
    assert found["standing"]["evidence_valid_until_ms"] > time.time() * 1000
    # it loses only what its clients seal to another that has joined meanwhile
    assert {one["reason"] for one in found["lost"]} <= {"not_sealed", "only", "filtered:only"}
    shown = provider("why", "--config", str(config)).stdout
    assert "its evidence holds until" in shown
    assert "went elsewhere in 24 hours" in shown


def test_why_of_one_job_says_what_it_earned(config: Path, jobs: int) -> None:
    settled(config, jobs)
    row = told("earnings", "--config", str(config), "--by", "job")["rows"][0]
    shown = provider("why", row["job_id"], "--config", str(config)).stdout
    assert f"earned {row['earned_nanoton']} nanoTON" in shown


def test_a_simulation_says_what_an_hour_brings_or_how_little_demand_there_was(
    config: Path, jobs: int
) -> None:
    settled(config, jobs)  # other tests share the network: there may be enough for a number
    done = provider("simulate", "--config", str(config), "--model", "skills-1", "--price", "0.08")
    assert done.returncode == 0
    found = told("simulate", "--config", str(config), "--model", "skills-1", "--price", "0.08")
    assert found["enough"] == (found["jobs"] >= 50)
    if not found["enough"]:
        assert done.stdout.startswith("too little demand in the log: ")
    else:
        assert "of the resamples lie between" in done.stdout


def test_the_doctor_finds_nothing_that_fails_on_a_network_that_works(config: Path) -> None:
    done = provider("doctor", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "ok    configuration", "ok    permissions", "ok    files of skills-1",
        "ok    engine of skills-1", "ok    test run of skills-1", "ok    trust", "ok    clock",
        "ok    bus", "ok    standing", "ok    price of skills-1",
    ):  # fmt: skip
        assert line in done.stdout, done.stdout
    assert "tokens/s" in done.stdout


def test_the_doctor_fails_where_something_fails_and_says_what_to_do(
    config: Path, tmp_path: Path
) -> None:
    text = config.read_text().replace("dev_platform_file", "#dev_platform_file")
    wrong = tmp_path / "provider.toml"
    seed = tmp_path / "open.seed"
    seed.write_bytes(b"SU")
    seed.chmod(0o644)
    lines = [
        f'seed_file = "{seed}"' if line.startswith("seed_file") else line
        for line in text.splitlines()
    ]
    wrong.write_text("\n".join(lines))
    found = provider("doctor", "--quick", "--json", "--config", str(wrong))
    assert found.returncode == 1
    checks = {one["check"]: one for one in json.loads(found.stdout)["checks"]}
    assert checks["permissions"]["state"] == "fail"
    assert checks["permissions"]["remedy"] == f"chmod 600 {seed}"
    assert checks["bus"]["state"] == "fail"


def test_status_shows_the_agent_and_its_money(config: Path, jobs: int) -> None:
    settled(config, jobs)
    found = told("status", "--config", str(config))
    assert [model["name"] for model in found["models"]] == ["skills-1"]
    assert int(found["earnings"]["today"]["earned_nanoton"]) > 0
    shown = provider("status", "--config", str(config)).stdout
    assert "skills-1" in shown
    assert "TON with" in shown


def test_a_drained_agent_ends_and_its_network_starts_it_again(
    config: Path, network: LiveNetwork
) -> None:
    before = network.pid("provider")
    done = provider("drain", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("drained\n")
    network.wait_restarted("provider", before)
    deadline = time.monotonic() + 30
    while True:
        shown = provider("status", "--config", str(config), "--json")
        if shown.returncode == 0 and not json.loads(shown.stdout)["draining"]:
            break
        assert time.monotonic() < deadline, shown.stderr
        time.sleep(0.2)


def test_without_a_file_each_command_says_how_to_make_one(tmp_path: Path) -> None:
    for verb in ("status", "earnings", "drain", "why", "run"):
        done = provider(verb, "--config", str(tmp_path / "none.toml"))
        assert done.returncode == 1, verb
        assert "cocoon provider init" in done.stderr, verb
