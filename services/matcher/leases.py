"""Leases in memory: what makes one live on, and when it must end (ending.py ends it in the log).

A lease lives while heartbeats name its job; it ends early when its provider is silent, restarts,
refuses the dispatch, is revoked, or has its result rejected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import (
    AttestationRevoked,
    ProviderMatched,
    ResultRejected,
)
from cocoon.contracts.messages import CancelJob, DispatchReport, Heartbeat
from cocoon.domain import matching
from cocoon.domain.job import JobState, JobStatus
from cocoon.domain.leasing import need_of
from cocoon.eventlog.append import LogAppender
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError
from services.matcher import decide
from services.matcher.decide import Reason
from services.matcher.ending import Ending
from services.matcher.lease import Lease, News
from services.matcher.memory import Memory
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings

Wanted = tuple[tuple[str, ...], str]  # recipient keys, model


class Leases:
    """All live leases of one shard. Methods run on one event loop."""

    def __init__(
        self,
        settings: MatcherSettings,
        memory: Memory,
        appender: LogAppender,
        news: News,
        clock: Clock,
        seeds: Seeds,
        stop: Callable[[CocoonError], None],
    ) -> None:
        self._settings, self._memory, self._clock = settings, memory, clock
        self._ending = Ending(self, settings, memory, appender, news, clock, seeds, stop)
        self.live: dict[str, Lease] = {}
        self._resumed_at_s = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life ----

    def start(self, match: ProviderMatched, gateway_id: str, traceparent: str) -> Lease:
        """Start the lease of a match that was decided; it is committed or forgotten later."""
        self.forget(match.job_id)
        now_s = self._clock.monotonic_s()
        lease = Lease(
            match=match,
            gateway_id=gateway_id,
            traceparent=traceparent,
            deadline_s=now_s + match.lease_ttl_ms / 1000,
            matched_at_s=now_s,
            renewed_at_s=now_s,
        )
        self.live[match.job_id] = lease
        self._memory.providers[match.provider_id].live_jobs.add(match.job_id)
        return lease

    def forget(self, job_id: str) -> None:
        lease = self.live.pop(job_id, None)
        if lease is not None:
            lease.committed.set()  # whoever waits to end it finds it gone
            self._memory.providers[lease.match.provider_id].live_jobs.discard(job_id)

    def resume(self, job_id: str, state: JobState) -> None:
        """After a restart: lease a running job again for a whole term.

        Nobody has been heard yet, so silence counts from now.
        """
        self._resumed_at_s = self._clock.monotonic_s()
        if state.status is JobStatus.MATCHED and state.match and state.request:
            self.start(state.match, state.request.gateway_id, "").committed.set()

    def deaf(self) -> None:
        """This process could not hear for a while: every lease gets the time to be renewed."""
        until_s = self._clock.monotonic_s() + self._memory.silence_s
        for lease in self.live.values():
            lease.deadline_s = max(lease.deadline_s, until_s)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- what is heard ----

    def on_heartbeat(self, beat: Heartbeat) -> None:
        now_s = self._clock.monotonic_s()
        restarted = self._memory.heartbeat(beat, now_s)
        running = dict(beat.running)
        for job_id in sorted(self._memory.providers[beat.provider_id].live_jobs):
            lease = self.live.get(job_id)
            if lease is None or lease.match.provider_id != beat.provider_id:
                continue
            if running.get(job_id) == lease.match.epoch:
                if now_s - lease.matched_at_s < self._settings.lease_limit_s:
                    lease.renewed_at_s = now_s
                    lease.deadline_s = now_s + lease.match.lease_ttl_ms / 1000
            elif restarted:
                self.end(job_id, lease, "gone", may_rematch=not lease.began)

    def on_report(self, report: DispatchReport) -> None:
        """A gateway says what became of a dispatch."""
        lease = self.live.get(report.job_id)
        if lease is None or lease.match.epoch != report.epoch:
            return
        if report.outcome == "began":
            if not lease.began:
                lease.began = True
                self._observe_first_token(report.job_id, lease)
            return
        if report.outcome == "busy":
            self._turn_away(report.job_id, lease)
            return
        reason, may_rematch, failure = decide.refusal(report)
        slow = report.outcome == "silent" and self._is_only_slow(report.job_id, lease)
        if not slow:
            self.end(report.job_id, lease, reason, may_rematch=may_rematch, failure=failure)
        elif not lease.committed.is_set():
            self._spawn(self._look_again(report, lease))

    async def _look_again(self, report: DispatchReport, lease: Lease) -> None:
        """Nobody heard the dispatch, and it was told before its match was in the log.

        The time for its answer is short, so it may have run out before the commit.
        """
        await lease.committed.wait()
        if self.live.get(report.job_id) is lease and not lease.began:
            self.on_report(report)

    def _observe_first_token(self, job_id: str, lease: Lease) -> None:
        state = self._memory.jobs.get(job_id)
        if state is None or state.request is None or not state.request.stream:
            return  # a whole answer begins when it ends: its time says nothing of the first token
        waited_s = self._clock.monotonic_s() - lease.matched_at_s
        view = self._memory.providers[lease.match.provider_id]
        view.observe_first_token(int(waited_s * 1_000_000))

    def _turn_away(self, job_id: str, lease: Lease) -> None:
        """Another shard's jobs, or this one's that ended in memory first, fill the provider."""
        if not lease.turned_away:
            lease.turned_away = True
            self.leave_place(job_id, lease)  # before it is said how full the provider is
            self._memory.told_busy(lease.match.provider_id)
        self._seek_room(job_id, lease, set())

    def _seek_room(self, job_id: str, lease: Lease, full: set[Wanted]) -> None:
        """Match the job again as soon as somebody has room, within the time that requests wait.

        `full`: whom this sweep has found without room, so that many waiting jobs cost one look.
        """
        self.leave_place(job_id, lease)
        now_s = self._clock.monotonic_s()
        if lease.waits_since_s is None:
            lease.waits_since_s = now_s
        over = now_s - lease.waits_since_s >= self._settings.waiting_s
        may_rematch = not over and lease.cancelled_at_s is None
        if not may_rematch or not self._all_full(job_id, full):
            self.end(job_id, lease, "busy", may_rematch=may_rematch, failure="providers_busy")

    def _all_full(self, job_id: str, known: set[Wanted]) -> bool:
        """Whether all of the job's providers that are heard have no room: nothing to decide yet."""
        state = self._memory.jobs.get(job_id)
        if state is None or state.request is None:
            return False  # its match is on its way to the log: the end waits for that
        wanted = (state.request.recipient_key_ids, state.request.model_id)
        if wanted in known:
            return True
        heard = [c for c in self._memory.candidates(*wanted, self._clock.monotonic_s()) if c.alive]
        if not heard or any(c.running < c.concurrency for c in heard):
            return False
        known.add(wanted)
        return True

    def leave_place(self, job_id: str, lease: Lease) -> None:
        """A job that was turned away fills nothing; its commit may have counted it in again."""
        self._memory.providers[lease.match.provider_id].live_jobs.discard(job_id)

    def _is_only_slow(self, job_id: str, lease: Lease) -> bool:
        """A dispatch unanswered so far, at a provider that is heard, with nobody else to take it.

        Giving up would fail the job; the provider may still answer, and if the dispatch was lost,
        no heartbeat names the job and the lease ends by itself.
        """
        now_s = self._clock.monotonic_s()
        if not self._memory.is_alive(lease.match.provider_id, now_s):
            return False
        state = self._memory.jobs.get(job_id)
        if state is None or state.request is None:
            return True  # its match is still on its way to the log: looked at again then
        request = state.request
        candidates = self._memory.candidates(request.recipient_key_ids, request.model_id, now_s)
        tried = frozenset((*state.tried, lease.match.provider_id))
        asked = self._memory.wishes_of(lease.match.job_id).preferences
        need = need_of(
            request, self._clock.now_ms(), tried, asked=asked,
            open_limits=self._memory.open_limits,
        )  # fmt: skip
        return isinstance(matching.choose(candidates, need, "00" * 32), matching.NoCandidate)

    def on_cancel(self, cancel: CancelJob) -> None:
        """The client has gone: the provider's receipt settles what it delivered, if one comes."""
        lease = self.live.get(cancel.job_id)
        if lease is not None and lease.cancelled_at_s is None:
            lease.cancelled_at_s = self._clock.monotonic_s()

    def on_network_event(self, event: object) -> None:
        if not isinstance(event, AttestationRevoked):
            return
        for job_id, lease in tuple(self.live.items()):
            if lease.match.provider_id == event.provider_id:
                self.end(job_id, lease, "revoked", may_rematch=not lease.began)

    def on_shard_event(self, stored: StoredEvent, event: object) -> None:
        job_id = stored.correlation_id
        lease = self.live.get(job_id)
        if lease is None:
            return
        if isinstance(event, ResultRejected) and event.epoch == lease.match.epoch:
            self.end(job_id, lease, "rejected", may_rematch=not lease.began)
        elif stored.type in ("PaymentSettled", "JobFailed", "JobCancelled"):
            self.forget(job_id)

    def sweep(self) -> None:
        """End the leases whose time, provider or client has gone.

        Once bytes went out nobody else can go on, and the result may still come: then a silent
        provider has the lease's whole time.
        """
        now_s = self._clock.monotonic_s()
        grace_s = self._settings.cancel_grace_s
        full: set[Wanted] = set()
        for job_id, lease in tuple(self.live.items()):
            provider_id = lease.match.provider_id
            if lease.turned_away:
                self._seek_room(job_id, lease, full)
                continue
            # While heartbeats name the job, its receipt is to come: what was delivered is paid.
            if (
                lease.cancelled_at_s is not None
                and now_s - max(lease.cancelled_at_s, lease.renewed_at_s) > grace_s
            ):
                self.end(job_id, lease, "expired", may_rematch=False)
            elif now_s > lease.deadline_s:
                self.end(job_id, lease, "expired", may_rematch=not lease.began)
            elif (
                lease.committed.is_set() and not lease.began and self._is_silent(provider_id, now_s)
            ):
                self.end(job_id, lease, "silent", may_rematch=True)

    def _is_silent(self, provider_id: str, now_s: float) -> bool:
        listening_s = now_s - self._resumed_at_s
        return listening_s > self._memory.silence_s and not self._memory.is_alive(
            provider_id, now_s
        )

    # ---- the end of a lease ----

    def end(
        self,
        job_id: str,
        lease: Lease,
        reason: Reason,
        *,
        may_rematch: bool,
        failure: str = "provider_lost",
    ) -> None:
        """Decide and append the lease's end, once, in a task of its own."""
        if lease.ending:
            return
        lease.ending = True
        self._spawn(self._ending.run(job_id, lease, reason, may_rematch, failure))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
