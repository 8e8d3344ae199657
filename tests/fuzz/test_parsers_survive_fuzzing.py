"""Every parser takes any bytes: its committed corpus, hostile sizes, and a short atheris run.

`python -m tests.fuzz NAME --runs N` runs longer; what that finds belongs into corpus/NAME.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from cocoon.evidence.collateral import NO_FLOORS
from cocoon.evidence.provider import verify_provider
from cocoon.sealing import Finished, Profile
from tests.fuzz import evidence_targets, sealing_targets
from tests.fuzz.make_corpus import MAKERS
from tests.fuzz.targets import CORPUS, MAX_INPUT_BYTES, TARGETS, seeds
from tests.support import sealing_world as world

ROOT = Path(__file__).resolve().parents[2]
RUNS = 1500
CORPUS_LIMIT_BYTES = 1024 * 1024
_SEEDS = [(name, path) for name in TARGETS for path in seeds(name)]
HOSTILE = {
    "nothing": b"",
    "zeros": bytes(MAX_INPUT_BYTES),
    "ones": b"\xff" * MAX_INPUT_BYTES,
    "digits": b"9" * MAX_INPUT_BYTES,
    "lists": b"[" * MAX_INPUT_BYTES,
    "objects": b'{"a":' * (MAX_INPUT_BYTES // 5),
    "closed-lists": b"[" * (MAX_INPUT_BYTES // 2) + b"]" * (MAX_INPUT_BYTES // 2),
    "text": b'"' + b"\\u00e9" * (MAX_INPUT_BYTES // 6 - 1) + b'"',
    "half-characters": b'["' + b"\\ud800" * (MAX_INPUT_BYTES // 6 - 1) + b'"]',
    "numbers": b"[" + b"1e999," * (MAX_INPUT_BYTES // 6 - 1) + b"1]",
    "keys": b"{" + b'"a":1,' * (MAX_INPUT_BYTES // 6 - 1) + b'"a":1}',
    "lines": b"\r\n" * (MAX_INPUT_BYTES // 2),
    "colons": b"a:b\r\n" * (MAX_INPUT_BYTES // 5),
    "certificates": b"-----BEGIN CERTIFICATE-----\n" * (MAX_INPUT_BYTES // 28),
    "signatures": "\u2014 a b\n".encode() * (MAX_INPUT_BYTES // 8),
}


@pytest.mark.parametrize(
    ("name", "path"), _SEEDS, ids=[f"{name}-{path.name}" for name, path in _SEEDS]
)
def test_a_committed_input_finds_nothing(name: str, path: Path) -> None:
    TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_sizes_find_nothing(name: str) -> None:
    for data in HOSTILE.values():
        assert len(data) <= MAX_INPUT_BYTES
        TARGETS[name](data)


def test_honest_requests_are_opened_so_that_the_targets_look_behind_the_header() -> None:
    for name in ("P0", "P1", "P2", "P3"):
        opened = sealing_targets.open_envelope((CORPUS / "request_envelope" / name).read_bytes())
        assert opened.body == world.BODY


@pytest.mark.parametrize("name", ["P0", "P1", "P2", "P3", "error", "parts-and-pad"])
def test_honest_responses_reach_their_receipt(name: str) -> None:
    data = (CORPUS / "response_records" / name).read_bytes()
    profile, pieces = Profile(data[0]), list(sealing_targets.pieces_of(data[1:]))
    frames, _ = sealing_targets.sealed_response(profile, pieces)
    events, code = sealing_targets.fed(sealing_targets.new_opener(profile), frames)
    assert code == ""
    assert isinstance(events[-1], Finished)


def test_the_honest_provider_is_believed() -> None:
    verdict = verify_provider(
        evidence_targets.evidence(), evidence_targets.trust(), evidence_targets.signed_policy(),
        NO_FLOORS, evidence_targets.NOW_MS,
    )  # fmt: skip
    assert str(verdict) == "ok:UpToDate"


def test_the_corpus_is_whole_small_and_of_these_targets() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == TARGETS.keys() == MAKERS.keys()
    assert sum(path.stat().st_size for _, path in _SEEDS) < CORPUS_LIMIT_BYTES
    assert [name for name in TARGETS if not 3 <= len(seeds(name)) <= 25] == []


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the printed lines of a run of all targets, each in a process of its own."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed here (its wheels are for Linux on x86-64)")
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.fuzz", "--runs", str(RUNS), "--keep", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_of_atheris_finds_nothing(name: str, short_run: tuple[Path, str]) -> None:
    folder, printed = short_run
    log = (folder / f"{name}.log").read_text(errors="replace")
    assert f"{name}: no finding\n" in printed, log[-3000:]
    assert f"Done {RUNS} runs" in log, log[-3000:]
