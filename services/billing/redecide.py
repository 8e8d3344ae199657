"""Pure: every stored command decided again on the state it was decided on, bytes against bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cocoon.contracts.commands import ExpireLease, RequestJob, decode_command
from cocoon.contracts.envelope import StoredEvent
from cocoon.domain import decide as domain
from cocoon.domain.decide import State
from cocoon.domain.job import JobState
from cocoon.kernel.errors import CocoonError, LogCorrupt
from services.billing.draws import Draws

MAX_DIFFERENCES = 20
MAX_ENDED_JOBS = 4096


@dataclass(slots=True)
class Report:
    """What a replay found, for one shard."""

    shard: int
    first: int
    last: int
    events: int = 0
    head_hash: str = ""
    snapshot: int = 0  # the position of the snapshot that the fold began with
    derived_sha256: str = ""
    live_sha256: str = ""
    decisions: int = 0
    seeds: int = 0  # of them, those whose seed was checked against a revealed secret
    parked: int = 0  # events that stand aside, in the tables as here
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(text)

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_DIFFERENCES:
            self.notes.append(text)


class Decisions:
    """Runs every stored command again on the state that it was decided on."""

    def __init__(self, report: Report, draws: Draws) -> None:
        self._report, self._draws = report, draws
        for told in draws.differences():
            report.say(told)
        self._states: dict[str, State] = {}
        self._ended: deque[str] = deque()  # jobs that only a late rejection may still touch

    def lacks(self, first: StoredEvent) -> bool:
        """Whether the stream's state before this event has to be learned: it began earlier."""
        return first.version > 1 and first.stream not in self._states

    def learn(self, stream: str, events: Iterable[StoredEvent]) -> None:
        """Fold what the stream held before the replayed range."""
        state = domain.initial(stream)
        for event in events:
            state = domain.evolve(state, event.decode(), stream)
        self._keep(stream, state)

    def check(self, command_bytes: bytes, events: Sequence[StoredEvent]) -> None:
        """Decide again and compare type, version, stream and bytes with what the log holds.

        Raises LogCorrupt for a command that does not decode.
        """
        try:
            command = decode_command(command_bytes)
        except (ValueError, KeyError, TypeError) as error:
            where = f"shard {events[0].shard} position {events[0].position}"
            raise LogCorrupt(f"{where}: the stored command does not decode") from error
        stream = domain.stream_of(command)
        state = self._states.get(stream, domain.initial(stream))
        try:
            decided = domain.decide(state, command)
        except CocoonError as error:
            decided = ()
            self._report.say(f"position {events[0].position}: decides {error.code} now")
        now = [(stream, e.event_type, e.schema_version, e.to_canonical()) for e in decided]
        then = [(e.stream, e.type, e.schema_version, e.data) for e in events]
        if now != then:
            self._report.say(
                f"position {events[0].position}: {command.command_type} decides "
                f"{[n[1] for n in now]} now, the log has {[t[1] for t in then]}"
            )
        self._report.decisions += 1
        if isinstance(command, RequestJob | ExpireLease):
            wrong = self._draws.check(command, events[0].position)
            self._report.seeds = self._draws.checked
            if wrong is not None:
                self._report.say(wrong)
        for event in events:
            state = domain.evolve(state, event.decode(), stream)
        self._keep(stream, state)

    def end(self) -> None:
        """Note what could not be checked; call it once, after the last command."""
        for told in self._draws.notes():
            self._report.note(told)

    def _keep(self, stream: str, state: State) -> None:
        """Live state stays; of the ended jobs only the latest, the others are learned again."""
        self._states[stream] = state
        if isinstance(state, JobState) and state.status.is_terminal:
            self._ended.append(stream)
            if len(self._ended) > MAX_ENDED_JOBS:
                self._states.pop(self._ended.popleft(), None)
