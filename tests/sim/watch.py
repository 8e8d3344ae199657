"""The sixteen invariants after every step, by the functions that judge real runs.

After each step they see what the step added (rows with the whole streams of their jobs, commands,
stream messages, ledger entries, clients' answers), standing on what was checked before. What a
part cannot show (11: the ledger's tables against a new fold, 3 and 2 from the beginning) and all
else again is looked at whole at every WHOLE-th step and at the end.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cocoon.contracts.envelope import GENESIS_HASH
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.domain.ledger import postings
from tests.invariants import check_all
from tests.support.collected import Before, Evidence, LedgerTables

if TYPE_CHECKING:
    from tests.sim.world import World

WHOLE = 2_000  # steps between two looks at everything


class Watch:
    """One history's judge."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows = {0: 0, 1: 0}  # checked so far
        self._commands = {0: 0, 1: 0}
        self._versions: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
        self._balances: dict[int, dict[str, int]] = {0: {}, 1: {}}
        self._event_ids: dict[int, set[str]] = {0: set(), 1: set()}
        self._stream_ends = {0: 0, 1: 0}
        self._generation = 0
        self._entries = 0
        self._steps = 0
        self._unseen = False  # whether something has come since the last look at everything
        self.looks = 0

    def after_step(self) -> list[str]:
        """What the last step violated, as sentences."""
        self._steps += 1
        changed = self._changed()
        self._unseen = self._unseen or changed
        if self._steps % WHOLE == 0 and self._unseen:
            self._unseen = False
            self._mark()
            return self.at_everything(quiet=False)
        if not changed:
            return []  # every invariant is a function of what is collected
        self.looks += 1
        said = check_all(self._added())
        self._mark()
        return said

    def at_everything(self, *, quiet: bool) -> list[str]:
        return check_all(self._world.evidence(quiet=quiet))

    def _changed(self) -> bool:
        world = self._world
        return (
            bool(world.changed_calls)
            or len(world.database.logs[1].events) != self._rows[1]
            or len(world.database.logs[0].events) != self._rows[0]
            or len(world.database.tables[1].entries) != self._entries
            or any(self._stream_end(shard) != self._stream_ends[shard] for shard in (0, 1))
            or world.bus.generation != self._generation
        )

    def _stream_end(self, shard: int) -> int:
        bus = self._world.bus
        return bus.first_sequence[shard] + len(bus.streams[shard]) - 1

    def _added(self) -> Evidence:
        world, tables = self._world, self._world.database.tables[1]
        logs = world.database.logs
        streams = {}
        for shard in (0, 1):
            kept = world.bus.streams[shard]
            if world.bus.generation == self._generation:
                new = self._stream_end(shard) - self._stream_ends[shard]
                kept = kept[max(0, len(kept) - new - 1) :]  # with the one before
            streams[shard] = kept
        calls = [world.calls[at] for at in sorted(world.changed_calls)]
        return Evidence(
            logs={shard: logs[shard].events[self._rows[shard] :] for shard in (0, 1)},
            commands={
                shard: list(logs[shard].commands.values())[self._commands[shard] :]
                for shard in (0, 1)
            },
            streams=streams,
            ledgers={
                1: LedgerTables(
                    tables.applied, tables.entries[self._entries :], tables.balances,
                    tables.settlements,
                )
            },
            calls=[call for call in calls if call is not None] + self._related(),
            before={shard: self._before(shard) for shard in (0, 1)},
        )  # fmt: skip

    def _related(self) -> list[object]:
        """What was said before under the same key or of the same job: invariant 10 compares."""
        world = self._world
        found: set[int] = set()
        for at in world.changed_calls:
            call = world.calls[at]
            if call is not None:
                found.update(world.calls_of[call.job_id])
                if call.idempotency_key:
                    found.update(world.calls_of[call.account_id, call.idempotency_key])
        return [world.calls[at] for at in sorted(found - world.changed_calls)]

    def _before(self, shard: int) -> Before:
        log, position = self._world.database.logs[shard], self._rows[shard]
        last = log.events[position - 1] if position else None
        return Before(
            position=position,
            hash=last.hash if last else GENESIS_HASH,
            recorded_at_us=last.recorded_at_us if last else 0,
            versions=self._versions[shard],
            balances=self._balances[shard],
            event_ids=self._event_ids[shard],
            log=log.events,
            stream=log.stream,
        )

    def _mark(self) -> None:
        """All that is there now has been checked."""
        world = self._world
        for shard in (0, 1):
            log = world.database.logs[shard]
            for stored in log.events[self._rows[shard] :]:
                self._versions[shard][stored.stream] += 1
                self._event_ids[shard].add(stored.event_id)
                if shard != NETWORK_SHARD:
                    self._post(shard, stored)
            self._rows[shard], self._commands[shard] = len(log.events), len(log.commands)
            self._stream_ends[shard] = self._stream_end(shard)
        self._generation = world.bus.generation
        self._entries = len(world.database.tables[1].entries)
        world.changed_calls.clear()

    def _post(self, shard: int, stored: object) -> None:
        balances = self._balances[shard]
        try:
            entries = postings(stored.decode())  # type: ignore[attr-defined]
        except ValueError:
            return  # invariant 4 has said so
        for entry in entries:
            balances[entry.account] = balances.get(entry.account, 0) + entry.amount_nanoton
            if not balances[entry.account]:
                del balances[entry.account]
