"""Whose secret the draws come from: one for each period, committed to before its first decision.

A secret is kept in a table that only the matcher's role can read, until it is revealed: after a
crash its successor goes on with it. One that is lost nevertheless is said to be lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from cocoon.contracts.commands import CommitMatchingSeed, RevealMatchingSeed
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import EventData
from cocoon.domain.decide import stream_of
from cocoon.domain.seeding import (
    SECRET_BYTES,
    commitment,
    decide_commit_seed,
    decide_reveal_seed,
    seed_of,
)
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import Unavailable
from cocoon.kernel.ids import named_command_id
from cocoon.telemetry.logs import get_logger
from services.matcher.decide import ACTOR
from services.matcher.memory import Memory
from services.matcher.settings import MatcherSettings

log = get_logger(__name__)


class SecretStore(Protocol):
    """Where secrets outlive this process. Raises Unavailable."""

    async def load(self) -> Iterable[bytes]: ...

    async def keep(self, secret: bytes) -> None: ...

    async def forget(self, secret: bytes) -> None: ...


class Seeds:
    """One shard's. `draw` gives a decision its seed; `tick` begins and reveals periods in time."""

    def __init__(
        self,
        settings: MatcherSettings,
        memory: Memory,
        appender: LogAppender,
        store: SecretStore,
        clock: Clock,
        randomness: Randomness,
    ) -> None:
        self._settings, self._memory, self._appender = settings, memory, appender
        self._store, self._clock, self._randomness = store, clock, randomness
        self._secrets: dict[str, bytes] = {}  # by commitment
        self._next = b""  # kept, but perhaps not committed to yet
        self._current: tuple[int, bytes] | None = None
        self._began_s = 0.0  # monotonic, when the current one began
        self._over_since_s: dict[int, float] = {}  # period -> since when it is a former one

    async def begin(self) -> None:
        """Read what a former process kept; call it once the memory has caught up with the log."""
        kept = {commitment(secret): secret for secret in await self._store.load()}
        committed = {text for _, text in self._memory.seeds.open}
        for text in kept.keys() - committed:  # its commitment never came to the log
            await self._store.forget(kept[text])
        self._secrets = {text: kept[text] for text in kept.keys() & committed}
        self._adopt()
        age_s = (self._clock.now_ms() - self._memory.seeds_since_ms) / 1000
        self._began_s -= max(0.0, age_s)  # by the log's clock: it may be wrong, but only once

    def draw(self, job_id: str, epoch: int) -> tuple[str, int]:
        """The seed of a job's match of this epoch, and the period whose secret gives it.

        Raises Unavailable while the log has no commitment yet.
        """
        if self._current is None:
            raise Unavailable("the network is starting; try again shortly", retry_after_s=1)
        period, secret = self._current
        return seed_of(secret, job_id, epoch), period

    async def tick(self) -> None:
        """Do what is due. Raises Unavailable when the log or the table is away: call it again."""
        self._adopt()
        if self._current is None or self._is_over():
            await self._commit()
        now_s = self._clock.monotonic_s()
        for period, committed in self._memory.seeds.open:
            if self._current is None or period >= self._current[0]:
                continue
            since_s = self._over_since_s.setdefault(period, now_s)
            if now_s - since_s >= self._settings.seed_revealed_after_s:
                await self._reveal(period, committed)

    def _adopt(self) -> None:
        """Go on with the newest commitment in the log, if its secret is known here."""
        state = self._memory.seeds
        newest = state.commitment(state.last)
        secret = self._secrets.get(newest or "")
        if secret is None:
            self._current = None
        elif self._current is None or self._current[0] != state.last:
            self._current = state.last, secret
            if secret == self._next:
                self._next = b""  # an append whose answer was lost: no second period gets it
            self._began_s = self._clock.monotonic_s()

    def _is_over(self) -> bool:
        return self._clock.monotonic_s() - self._began_s >= self._settings.seed_period_s

    async def _commit(self) -> None:
        secret = self._next = self._next or self._randomness.token(SECRET_BYTES)
        await self._store.keep(secret)
        self._secrets[commitment(secret)] = secret
        state = self._memory.seeds
        command = CommitMatchingSeed(
            shard=self._settings.shard, period=state.last + 1, commitment=commitment(secret)
        )
        await self._append(command, decide_commit_seed(state, command))
        self._next = b""
        self._adopt()
        log.info("matching_seed_committed", shard=command.shard, position=self._memory.position)

    async def _reveal(self, period: int, committed: str) -> None:
        secret = self._secrets.get(committed)
        command = RevealMatchingSeed(
            shard=self._settings.shard, period=period, secret=secret.hex() if secret else None
        )
        state = self._memory.seeds
        await self._append(command, decide_reveal_seed(state, command))
        self._over_since_s.pop(period, None)
        if secret is None:
            log.warning("matching_seed_lost", shard=command.shard)
            return
        self._secrets.pop(committed, None)
        await self._store.forget(secret)

    async def _append(
        self, command: CommitMatchingSeed | RevealMatchingSeed, events: Iterable[EventData]
    ) -> None:
        stream = stream_of(command)
        item = AppendItem(
            command_id=named_command_id(
                command.command_type, str(command.shard), str(command.period),
                command.to_canonical().hex(),
            ),
            command=command.to_stored(),
            actor=ACTOR,
            correlation_id=stream,
            expects=((stream, self._memory.seeds.version),),
            events=tuple(NewEvent(stream, event) for event in events),
        )  # fmt: skip
        outcome = await self._appender.append(item)
        if not isinstance(outcome, Appended):
            raise Unavailable("this shard's seeds are changing; try again", retry_after_s=1)
        self._memory.apply_appended(outcome.events)
