"""How a lease ends: decide -> append -> lease the next match, or tell the gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cocoon.contracts.commands import ExpireLease
from cocoon.contracts.events import EventData, JobCancelled, JobFailed, ProviderMatched
from cocoon.domain.job import JobState
from cocoon.domain.leasing import decide_expire_lease
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError, Fatal
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.matcher import decide
from services.matcher.decide import Reason
from services.matcher.lease import CONFLICT_PAUSE_S, Lease, News
from services.matcher.memory import Memory
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings

if TYPE_CHECKING:
    from services.matcher.leases import Leases

log = get_logger(__name__)
CONFLICT_TRIES = 20


class Ending:
    """Ends leases of one shard, each in the task that `Leases.end` makes for it."""

    def __init__(
        self,
        leases: Leases,
        settings: MatcherSettings,
        memory: Memory,
        appender: LogAppender,
        news: News,
        clock: Clock,
        seeds: Seeds,
        stop: Callable[[CocoonError], None],
    ) -> None:
        self._leases, self._settings, self._memory = leases, settings, memory
        self._appender, self._news, self._clock = appender, news, clock
        self._seeds, self._stop = seeds, stop

    async def run(
        self, job_id: str, lease: Lease, reason: Reason, may_rematch: bool, failure: str
    ) -> None:
        """End one lease; what could not be decided now is tried again by the next sweep."""
        await lease.committed.wait()
        try:
            for _ in range(CONFLICT_TRIES):
                if self._leases.live.get(job_id) is not lease:
                    return
                if await self._try_end(job_id, lease, reason, may_rematch, failure):
                    return
                await asyncio.sleep(CONFLICT_PAUSE_S)  # billing was first: its event is coming
        except Fatal as error:
            self._stop(error)
        except CocoonError as error:
            log.warning("lease_end_failed", job_id=job_id, code=error.code)
        lease.ending = False  # the next sweep tries again

    async def _try_end(
        self, job_id: str, lease: Lease, reason: Reason, may_rematch: bool, failure: str
    ) -> bool:
        state = self._memory.jobs.get(job_id)
        if state is None:
            self._leases.forget(job_id)
            return True
        if lease.turned_away:
            self._leases.leave_place(job_id, lease)
        command = self._command(state, lease, reason, may_rematch, failure)
        events = decide_expire_lease(state, command)
        if not events:
            lease.ending = not lease.turned_away
            return True
        item = decide.expire_item(command, state, events, lease.traceparent)
        with self._place_kept(events[-1]) as place:
            outcome = await self._appender.append(item)
            if not isinstance(outcome, Appended):
                return False
            place.pop_all()
        self._memory.apply_appended(outcome.events)
        log.info("lease_ended", job_id=job_id, epoch=command.epoch, code=reason)
        metrics.LEASES_EXPIRED.inc(reason)
        await self._follow(job_id, lease, outcome)
        return True

    def _place_kept(self, last: EventData) -> contextlib.ExitStack:
        """Count the next match's job at its provider while it is on its way to the log."""
        place = contextlib.ExitStack()
        if isinstance(last, ProviderMatched):
            live_jobs = self._memory.providers[last.provider_id].live_jobs
            live_jobs.add(last.job_id)
            place.callback(live_jobs.discard, last.job_id)
        return place

    def _command(
        self, state: JobState, lease: Lease, reason: Reason, may_rematch: bool, failure: str
    ) -> ExpireLease:
        request = state.request
        candidates = (
            self._memory.candidates(
                request.recipient_key_ids, request.model_id, self._clock.monotonic_s()
            )
            if request
            else ()
        )
        wishes = self._memory.wishes_of(lease.match.job_id)
        seed, seed_period = self._seeds.draw(lease.match.job_id, lease.match.epoch + 1)
        return ExpireLease(
            job_id=lease.match.job_id,
            epoch=lease.match.epoch,
            reason=reason,
            may_rematch=may_rematch,
            cancelled=lease.cancelled_at_s is not None,
            failure=failure,
            candidates=candidates,
            lease_ttl_ms=self._settings.lease_ttl_ms,
            seed=seed,
            now_ms=self._clock.now_ms(),
            again=lease.turned_away and reason == "busy",
            policy=self._memory.policy,
            preferences=wishes.preferences,
            affinity=wishes.affinity,
            seed_period=seed_period,
            open_limits=self._memory.open_limits,
        )

    async def _follow(self, job_id: str, lease: Lease, outcome: Appended) -> None:
        """Lease the next match, or tell the gateway that the job has ended."""
        last = outcome.events[-1].decode()
        position = outcome.positions[-1]
        if isinstance(last, ProviderMatched):
            following = self._leases.start(last, lease.gateway_id, lease.traceparent)
            following.waits_since_s = lease.waits_since_s
            following.committed.set()
            await self._news(
                lease.gateway_id, job_id, decide.matched_update(last), lease.traceparent
            )
            committed = decide.committed_update(last, position)
            await self._news(lease.gateway_id, job_id, committed, lease.traceparent)
        elif isinstance(last, JobFailed | JobCancelled):
            self._leases.forget(job_id)
            update = decide.ended_update(job_id, last)
            await self._news(lease.gateway_id, job_id, update, lease.traceparent)
