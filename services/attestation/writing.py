"""Attestation's pen: decide on a stream's state and append, one decision a stream at a time.

A provider may grow the log only so fast; a lost race is decided again on the newer state.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from cocoon.contracts import commands as c
from cocoon.contracts.envelope import StoredEvent
from cocoon.domain import decide as domain
from cocoon.domain.honesty import HonestyState
from cocoon.domain.provider import ProviderState
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import RateLimited, Unavailable
from services.attestation import decide
from services.attestation.memory import Memory

MAX_CONFLICTS = 5
CONFLICT_PAUSE_S = 0.05
WRITES_WINDOW_S = 600.0
# the platform's and its operator's own
UNLIMITED = (c.RevokeAttestation, c.PublishPolicy, c.JudgeCanary, c.LiftHonesty)


class Writer:
    """Appends to providers' streams and the policy's. `writes`: how many a provider has in ten
    minutes. `learn` is told each event at once; the tail brings it again."""

    def __init__(
        self, memory: Memory, appender: LogAppender, clock: Clock, writes: int,
        learn: Callable[[StoredEvent], None],
    ) -> None:  # fmt: skip
        self._memory = memory
        self._learn = learn
        self._appender = appender
        self._clock = clock
        self._limit = writes
        self._spent: dict[str, deque[float]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def append(
        self,
        command: c.Command,
        traceparent: str = "",
        still_wanted: Callable[[], bool] | None = None,
    ) -> int:
        """Decide and append; the position of the last event (the log's, if nothing changed).

        `still_wanted` is asked once the stream is ours: what was decided before a wait may be over.
        Raises what the deciders do, RateLimited, and Unavailable after too many lost races.
        """
        stream = domain.stream_of(command)
        async with self._locks.setdefault(stream, asyncio.Lock()):
            for _ in range(MAX_CONFLICTS):
                if still_wanted is not None and not still_wanted():
                    return self._memory.position
                state, version = self._state(stream)
                item = decide.item(state, version, command, traceparent)
                if item is None:
                    return self._memory.position
                if not isinstance(command, UNLIMITED):
                    self._spend_write(stream)
                outcome = await self._appender.append(item)
                if isinstance(outcome, Appended):
                    for stored in outcome.events:
                        self._learn(stored)
                    return outcome.positions[-1]
                await asyncio.sleep(CONFLICT_PAUSE_S)  # the tail brings the stream's new version
        raise Unavailable("the provider is changing; try again shortly", retry_after_s=1)

    def _state(self, stream: str) -> tuple[domain.State, int]:
        if stream == decide.NETWORK_POLICY:
            return None, self._memory.policy_versions
        aggregate, _, provider_id = stream.partition("/")
        if aggregate == "honesty":
            honesty = self._memory.honesty.get(provider_id, HonestyState())
            return honesty, honesty.version
        state = self._memory.providers.get(provider_id, ProviderState())
        return state, state.version

    def check_pace(self, command: c.Command) -> None:
        """Raises RateLimited if an append would now be refused for it."""
        self._room_of(domain.stream_of(command))

    def _spend_write(self, stream: str) -> None:
        self._room_of(stream).append(self._clock.monotonic_s())

    def _room_of(self, stream: str) -> deque[float]:
        now_s = self._clock.monotonic_s()
        spent = self._spent.setdefault(stream, deque())
        while spent and now_s - spent[0] > WRITES_WINDOW_S:
            spent.popleft()
        if len(spent) >= self._limit:
            raise RateLimited(
                "this provider has written too much to the log; try again in some minutes",
                retry_after_s=min(600, int(WRITES_WINDOW_S - (now_s - spent[0])) + 1),
            )
        return spent
