"""Makes the logs of the corpus: histories of the simulator, run by the services' own code.

    .venv/bin/python -m tests.vectors.make_logs NAME SEED STEPS

network-1 is another kind: `cocoon replay --export` of a development network under the tests of
chat, refusals and disconnects.

A log that is committed stays for ever: new code must replay it to the same bytes. After a change
that is meant to decide otherwise, add logs; never make an old one again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from cocoon.eventlog.read import StoredCommand
from services.billing.logfile import Header, LogFile, replay_file
from tests.sim import history
from tests.sim.world import World
from tests.support.model_log import ModelLog

FOLDER = Path(__file__).with_name("logs")
EXPECTED = FOLDER / "expected.json"


class _KeptWorld(World):
    """The world of the last history, for what it leaves."""

    last: World

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        _KeptWorld.last = self


def run(seed: int, steps: int) -> World:
    """A history that held every invariant to its end."""
    history.World = _KeptWorld  # type: ignore[misc]
    outcome = history.run_history(seed, steps)
    assert not outcome.violations, outcome.violations
    return _KeptWorld.last


def write(path: Path, logs: dict[int, ModelLog], parked: dict[int, str] | None = None) -> None:
    """Whole shards as one file."""
    file = LogFile(path)
    for shard, log in sorted(logs.items()):
        header = Header(
            shard, len(log.events), log.head_hash.hex(), (parked or {}) if shard else {}
        )
        file.begin(header)
        for command in sorted(log.commands.values(), key=_first):
            rows = log.events[command.first_position - 1 : command.last_position]
            if rows:
                file.add(command, [r.hashed_text() for r in rows], [r.hash for r in rows])
    file.close()


def _first(command: StoredCommand) -> tuple[int, int]:
    return command.first_position, command.last_position


def verdicts(path: Path) -> list[dict[str, object]]:
    """What a replay of the file finds, as expected.json holds it."""
    return [
        {
            "shard": report.shard, "events": report.events, "head": report.head_hash,
            "decisions": report.decisions, "books": report.derived_sha256,
            "differences": report.differences,
        }
        for report in asyncio.run(replay_file(path, decisions=True))
    ]  # fmt: skip


def main() -> None:
    name, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    path = FOLDER / f"{name}.log.gz"
    world = run(seed, steps)
    write(path, world.database.logs)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {}
    expected[path.name] = verdicts(path)
    EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    kinds: dict[str, int] = {}
    for stored in world.database.logs[1].events:
        kinds[stored.type] = kinds.get(stored.type, 0) + 1
    print(path.stat().st_size, "bytes", kinds)


if __name__ == "__main__":
    main()
