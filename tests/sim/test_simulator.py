"""The simulator itself: one seed gives one history, faults happen, and what CI runs of it.

The budget is steps, never seconds: on a quiet machine this file takes about a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from services.matcher.memory import Memory
from tests.sim.__main__ import main
from tests.sim.faults import KINDS
from tests.sim.history import Outcome, run_history

ROOT = Path(__file__).parents[2]
SEEDS = Path(__file__).with_name("seeds.txt")
STEPS = 4_000
CHUNK = 4
FIRST_SEEDS = range(100, 148, CHUNK)


@cache
def history(seed: int) -> Outcome:
    return run_history(seed, STEPS)


def committed() -> list[tuple[int, int, str]]:
    found = []
    for line in SEEDS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            seed, steps, why = line.split(" ", 2)
            found.append((int(seed), int(steps), why))
    return found


@pytest.mark.parametrize("first", FIRST_SEEDS)
def test_the_invariants_hold_after_every_step_and_everything_ends(first: int) -> None:
    for seed in range(first, first + CHUNK):
        outcome = history(seed)
        assert outcome.violations == [], f"./cocoon sim --seed {seed} --steps {STEPS}"
        assert outcome.steps == STEPS


@pytest.mark.parametrize(("seed", "steps", "why"), committed())
def test_a_seed_that_failed_once_holds(seed: int, steps: int, why: str) -> None:
    assert run_history(seed, steps).violations == [], why


def test_one_seed_gives_one_history() -> None:
    once, again, other = run_history(5, 2_000), run_history(5, 2_000), run_history(6, 2_000)
    assert once.digest == again.digest
    assert once.kinds == again.kinds
    assert once.digest != other.digest


def told(hash_seed: str) -> dict[str, object]:
    """The command in a process of its own, where sets and dictionaries of texts differ."""
    done = subprocess.run(
        [sys.executable, "-m", "cocoon.cli", "sim", "--seed=11", "--steps=2500", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "COCOON_ROOT": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_another_process_gives_the_same_history() -> None:
    first, second = told("1"), told("2")
    assert first["hash"] == second["hash"]
    assert first["faults"] == second["faults"]


def test_every_kind_of_fault_and_of_end_happens() -> None:
    """A simulator that never reaches a state finds nothing there."""
    faults: Counter[str] = Counter()
    jobs: Counter[str] = Counter()
    for first in FIRST_SEEDS:
        for seed in range(first, first + CHUNK):
            faults += history(seed).faults
            jobs += history(seed).jobs
    assert sorted(set(KINDS) - faults.keys()) == []
    assert jobs.keys() == {"PaymentSettled", "FundsRefused", "JobFailed", "JobCancelled"}
    assert jobs["PaymentSettled"] > 400


def test_one_history_is_no_histories(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "40"]) == 0
    assert capsys.readouterr().out.startswith("1 history, 40 steps")
    assert main(["--steps", "40", "--histories", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 histories, 80 steps")


def test_a_violation_names_its_seed_its_step_and_what_led_to_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with mock.patch.object(Memory, "reserve", lambda *_: None):  # noqa: PT008 - a method of ours
        code = main(["--seed", "1", "--steps", "4000", "--histories", "12"])
    said = capsys.readouterr().out
    assert code == 1
    assert "8 no_client_below_zero: client:acct_poor fell to" in said
    assert "VIOLATED at step" in said
    assert "the last steps:" in said
    assert "again: ./cocoon sim --seed" in said
