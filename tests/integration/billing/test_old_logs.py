"""Old logs under today's code: the same books, and every decision made again with the same bytes.

tests/vectors/make_logs.py says where they come from. A log that is here stays here.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cocoon.contracts.events import JobFailed, LeaseExpired, ResultRejected, decode_event
from cocoon.kernel.errors import LogCorrupt
from services.billing import logfile, replay
from tests.vectors.make_logs import EXPECTED, FOLDER

KEPT = json.loads(EXPECTED.read_text(encoding="utf-8"))
LOGS = sorted(FOLDER.glob("*.log.gz"))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
async def test_an_old_log_gives_the_same_books_and_decisions(log: Path) -> None:
    found = await logfile.replay_file(log, decisions=True)
    assert [
        {
            "shard": r.shard, "events": r.events, "head": r.head_hash, "decisions": r.decisions,
            "books": r.derived_sha256, "differences": r.differences,
        }
        for r in found
    ] == KEPT[log.name]  # fmt: skip
    assert all(not report.differences for report in found)


def test_every_old_log_is_replayed() -> None:
    assert [log.name for log in LOGS] == sorted(KEPT)
    assert len(LOGS) >= 5


def test_the_old_logs_hold_what_goes_wrong_in_a_network() -> None:
    seen: Counter[str] = Counter()
    for log in LOGS:
        for line in lines(log):
            for text, _ in line.get("events", []) if "id" in line else []:  # type: ignore[attr-defined]
                fields = text.split("\n", 11)
                event = decode_event(fields[4], int(fields[5]), fields[11])
                seen[event.event_type] += 1
                if isinstance(event, (LeaseExpired, ResultRejected, JobFailed)):
                    seen[f"{event.event_type}:{event.reason}"] += 1
    assert {
        "PaymentSettled", "FundsRefused", "JobCancelled", "AttestationRevoked",
        "LeaseExpired:expired", "LeaseExpired:silent", "LeaseExpired:refused", "LeaseExpired:gone",
        "LeaseExpired:revoked", "LeaseExpired:rejected", "ResultRejected:stale_epoch",
        "ResultRejected:receipt_sig", "ResultRejected:wrong_price", "JobFailed:deadline_exceeded",
        "JobFailed:unknown_key", "ProviderProfilePublished", "MatchingSeedCommitted",
        "MatchingSeedRevealed",
    } <= set(seen)  # fmt: skip


async def test_the_seeds_of_an_old_log_are_those_that_its_secrets_give() -> None:
    found = await logfile.replay_file(FOLDER / "seeds-1.log.gz", decisions=True)
    (shard,) = [report for report in found if report.shard == 1]
    assert shard.seeds > 20


def test_a_seed_that_was_chosen_is_found_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command whose draw does not matter, under another seed: same events, and blamed."""
    values = lines(FOLDER / "seeds-1.log.gz")
    commands = [v for v in values if '"seed_period":1,' in str(v.get("data"))]
    alone = next(v for v in commands if str(v["data"]).count('"provider_id":') == 1)
    data = str(alone["data"])
    seed = data.partition('"seed":"')[2][:64]
    alone["data"] = data.replace(seed, seed[::-1])
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(v).encode() + b"\n" for v in values)))
    assert replay.main(["--file", str(path), "--decisions"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line]
    assert len(told) == 1
    assert told[0].endswith("its seed is not the one that its secret gives")


Change = Callable[[list[dict[str, object]]], object]


def _first_command(values: list[dict[str, object]]) -> dict[str, object]:
    return next(v for v in values if '"type":"RequestJob"' in str(v.get("data")))


def _change_event(values: list[dict[str, object]]) -> None:
    event = _first_command(values)["events"][0]  # type: ignore[index]
    event[0] = event[0].replace('"stream":', '"straem":')


def _change_hash(values: list[dict[str, object]]) -> None:
    event = _first_command(values)["events"][0]  # type: ignore[index]
    event[1] = event[1][::-1]


CORRUPT: dict[str, Change] = {
    "an event": _change_event,
    "a hash": _change_hash,
    "no hash": lambda values: _first_command(values).update(events=[["x", "y"]]),
    "a missing command": lambda values: values.remove(_first_command(values)),
    "a missing end": lambda values: values.pop(),
    "an unknown command": lambda values: _first_command(values).update(data="{}"),
    "no command": lambda values: _first_command(values).update(data=7),
    "no events": lambda values: _first_command(values).update(events=[]),
    "no header": lambda values: values.pop(0),
    "another head": lambda values: values[0].update(head="00" * 32),
    "a damaged header": lambda values: values[0].update(parked=[]),
    "no objects": lambda values: values.insert(1, []),  # type: ignore[arg-type]
    "half a character": lambda values: _first_command(values).update(data="\ud800"),
    "half a character in an event": lambda values: _first_command(values).update(
        events=[["\ud800", "00" * 32]]
    ),
    "a number for an event": lambda values: _first_command(values).update(events=[7]),
    "other names": lambda values: values.insert(1, {"x": 1}),
    "nothing": lambda values: values.clear(),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_changed_file_is_corrupt(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = lines(LOGS[0])
    CORRUPT[what](values)
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(v).encode() + b"\n" for v in values)))
    assert replay.main(["--file", str(path), "--decisions"]) == 2
    assert capsys.readouterr().out.startswith("the log is corrupt: ")


@pytest.mark.parametrize(
    "data", [b"# A page of text\n", gzip.compress(b"text\n")], ids=["text", "gzip"]
)
def test_another_file_is_no_corrupt_log_but_wrong_usage(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(data)
    assert replay.main(["--file", str(path)]) == 64
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{path} is not an exported log" in told.err


@pytest.mark.parametrize("cut", [1, 100, 5000, 20_000])
async def test_a_file_that_is_cut_short_is_corrupt(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "log.gz"
    path.write_bytes(LOGS[0].read_bytes()[:-cut])
    with pytest.raises(LogCorrupt):
        await logfile.replay_file(path, decisions=False)


def test_a_decision_that_is_another_now_is_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = lines(LOGS[0])
    command = next(v for v in values if '"candidates":[{' in str(v.get("data")))
    command["data"] = str(command["data"]).replace('"alive":true', '"alive":false')
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(v).encode() + b"\n" for v in values)))
    assert replay.main(["--file", str(path)]) == 0
    assert replay.main(["--file", str(path), "--decisions"]) == 1
    assert "RequestJob decides" in capsys.readouterr().out
