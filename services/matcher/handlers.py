"""What the matcher does when a gateway asks: load -> decide -> append, and say so.

A match is announced at once and committed meanwhile; the gateway holds the first byte until the
commit, so a dispatch whose append fails is harmless: its result is refused and unpaid.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from cocoon.contracts.commands import RequestJob
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import EventData, FundsRefused, JobRequested, ProviderMatched
from cocoon.contracts.messages import CancelJob, JobRequest, MatchUpdate
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import (
    CocoonError,
    Conflict,
    DeadlineExceeded,
    Fatal,
    InsufficientFunds,
    RateLimited,
    Unavailable,
)
from cocoon.kernel.money import NANOTON_PER_TON, ceil_div, format_ton
from cocoon.telemetry import metrics
from services.matcher import decide
from services.matcher.accepted import AcceptedCommands
from services.matcher.lease import CONFLICT_PAUSE_S, News
from services.matcher.leases import Leases
from services.matcher.memory import Memory, Wishes
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings
from services.matcher.waiting import Waiting, WaitingRoom

REMEMBERED_COMMANDS = 16_384  # to twice as many, besides those of running jobs
MAX_ACCOUNT_CONFLICTS = 5
WAITING_PER_SWEEP = 64
RECALLED_AT_ONCE = 512  # commands of running jobs, after a restart
LOOK_UP_S = 0.5  # a refusal waits no longer for the log to know its command
_LOG_IS_AWAY: Final = frozenset({"log_away", "log_queue_full"})


_ENDS: Final = {
    "PaymentSettled": "settled",
    "FundsRefused": "funds_refused",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
}


class Matcher:
    """One shard's door for gateways. All methods run on one event loop."""

    def __init__(
        self,
        settings: MatcherSettings,
        memory: Memory,
        leases: Leases,
        appender: LogAppender,
        news: News,
        clock: Clock,
        seeds: Seeds,
        stop: Callable[[CocoonError], None],
        find_job: Callable[[str], Awaitable[str | None]],
        find_requests: Callable[[Sequence[str]], Awaitable[Iterable[RequestJob]]],
    ) -> None:
        """`find_job`: the job of a command that the log has. `find_requests`: the stored commands
        that began these jobs.
        """
        self._settings, self._memory, self._leases = settings, memory, leases
        self._appender, self._news, self._clock = appender, news, clock
        self._seeds, self._stop = seeds, stop
        self._began_us = clock.now_ms() * 1000
        self.waiting = WaitingRoom(settings.waiting_limit, settings.waiting_limit_per_account)
        self._deciding: set[str] = set()  # command ids
        self._deciding_jobs: set[str] = set()
        self._accepted_before = AcceptedCommands(memory.jobs, REMEMBERED_COMMANDS)
        self._find_job, self._find_requests = find_job, find_requests

    async def on_job_request(self, request: JobRequest, traceparent: str) -> None:
        """Answer a gateway: matched and committed, or existing, or waiting, or refused."""
        await self._answer(request, traceparent, None)

    async def _answer(self, request: JobRequest, traceparent: str, waited: Waiting | None) -> None:
        if request.command_id in self._deciding:
            return  # the gateway repeats itself; the first answer is on its way
        self._deciding.add(request.command_id)
        try:
            known = self._accepted_before.get(request.command_id)
            if known is not None:
                await self._existing(request, known, traceparent)
            else:
                await self._request_once(request, traceparent)
        except RateLimited as error:
            await self._wait_or_refuse(request, traceparent, error, waited)
        except Fatal as error:
            self._stop(error)
        except (DeadlineExceeded, Unavailable) as error:
            await self._refuse_if_new(request, error, traceparent)
        except CocoonError as error:
            await self._refuse(request, error, traceparent)
        finally:
            self._deciding.discard(request.command_id)

    async def _request_once(self, request: JobRequest, traceparent: str) -> None:
        """One command at a time for a job id: another's would take this one's hold and lease."""
        if request.job_id in self._deciding_jobs:
            raise _job_id_used()
        self._deciding_jobs.add(request.job_id)
        try:
            await self._request_job(request, traceparent)
        finally:
            self._deciding_jobs.discard(request.job_id)

    async def _request_job(self, request: JobRequest, traceparent: str) -> None:
        announced: ProviderMatched | None = None
        for _ in range(MAX_ACCOUNT_CONFLICTS):
            command = self._command(request, announced)
            version = self._memory.accounts[request.account_id].version
            state = self._memory.jobs.get(request.job_id, JobState())
            events = self._decide(state, command, announced)
            granted = events[-1] if isinstance(events[-1], ProviderMatched) else None
            if granted is not None:
                self._grant(request, granted, traceparent)
                if announced is None:
                    update = decide.matched_update(granted)
                    await self._news(request.gateway_id, request.job_id, update, traceparent)
                    await asyncio.sleep(0)  # it is written before the append is prepared
                announced = granted
            item = decide.request_item(request, command, events, version, traceparent)
            try:
                outcome = await self._appender.append(item)
            except CocoonError:
                self._withdraw(request.job_id)
                raise
            if isinstance(outcome, Appended):
                await self._accepted(request, outcome, granted, traceparent)
                return
            self._withdraw(request.job_id)
            if outcome.stream.startswith("job/"):
                raise _job_id_used()
            await asyncio.sleep(CONFLICT_PAUSE_S)  # the tail brings the account's new version
        raise Unavailable("the account is changing; try again shortly", retry_after_s=1)

    def _decide(
        self, state: JobState, command: RequestJob, announced: ProviderMatched | None
    ) -> tuple[EventData, ...]:
        try:
            return decide_request_job(state, command)
        except RateLimited:
            if announced is None:
                raise
            # The gateway has dispatched this epoch already: it cannot wait for another provider.
            raise Unavailable("the account is changing; try again", retry_after_s=1) from None

    def _command(self, request: JobRequest, announced: ProviderMatched | None) -> RequestJob:
        """A match that was announced stays with its provider: the gateway has dispatched it."""
        keys = (announced.key_id,) if announced else request.recipient_key_ids
        account = self._memory.accounts.get(request.account_id)
        if account is None or not account.opened:
            raise InsufficientFunds(
                f"the account {request.account_id} has no funds; add some with "
                f"`./cocoon fund {request.account_id} 1`"
            )
        seed, seed_period = self._seeds.draw(request.job_id, 1)
        return decide.request_command(
            request,
            self._memory.available_nanoton(request.account_id),
            self._memory.candidates(keys, request.model_id, self._clock.monotonic_s()),
            self._settings.lease_ttl_ms,
            seed,
            self._clock.now_ms(),
            self._memory.policy,
            seed_period=seed_period,
            open_limits=self._memory.open_limits,
        )

    def _grant(self, request: JobRequest, match: ProviderMatched, traceparent: str) -> None:
        """Reserve the hold and start the lease: the log may still say no."""
        self._memory.reserve(request.job_id, request.account_id, request.max_price_nanoton)
        self._memory.wish(request.job_id, Wishes(request.preferences, request.affinity))
        self._leases.start(match, request.gateway_id, traceparent)

    def _withdraw(self, job_id: str) -> None:
        self._memory.release_pending(job_id)
        self._memory.forget_wish(job_id)
        self._leases.forget(job_id)

    async def _accepted(
        self,
        request: JobRequest,
        outcome: Appended,
        granted: ProviderMatched | None,
        traceparent: str,
    ) -> None:
        events = [stored.decode() for stored in outcome.events]
        job_id = outcome.events[0].correlation_id
        self._accepted_before.add(request.command_id, job_id)
        if outcome.repeated and (events[-1] != granted or self._is_over(job_id, outcome)):
            self._withdraw(request.job_id)
            await self._existing(request, job_id, traceparent, fold(events))
            return
        if granted is not None:  # first of all: the gateway holds the first byte for it
            update = decide.committed_update(granted, outcome.positions[-1])
            await self._news(request.gateway_id, request.job_id, update, traceparent)
        self._memory.apply_appended(outcome.events)
        self._refuse_unfunded(events[-1])
        lease = self._leases.live.get(request.job_id)
        if lease is not None:
            lease.committed.set()

    def _is_over(self, job_id: str, outcome: Appended) -> bool:
        """Whether the tail has brought this job and its end: its match was another's, long ago."""
        return outcome.positions[-1] <= self._memory.position and job_id not in self._memory.jobs

    def _refuse_unfunded(self, last: EventData) -> None:
        if isinstance(last, FundsRefused):
            missing = ceil_div(last.needed_nanoton - last.available_nanoton, NANOTON_PER_TON)
            raise InsufficientFunds(
                f"this job may cost up to {format_ton(last.needed_nanoton)} TON and the account "
                f"{last.account_id} has {format_ton(last.available_nanoton)} TON free; add funds "
                f"with `./cocoon fund {last.account_id} {missing}`, or lower max_tokens"
            )

    async def _existing(
        self,
        request: JobRequest,
        job_id: str,
        traceparent: str,
        state: JobState | None = None,
    ) -> None:
        """This command has a job: name it; the gateway attaches to it or serves its result."""
        state = self._memory.jobs.get(job_id) or state
        req_hash = state.request.req_hash if state and state.request else ""
        update = MatchUpdate(kind="existing", job_id=job_id, req_hash=req_hash)
        await self._news(request.gateway_id, request.job_id, update, traceparent)

    async def _refuse_if_new(
        self, request: JobRequest, error: CocoonError, traceparent: str
    ) -> None:
        """A repeat of what the log has and this memory has forgotten names its job, whatever has
        run out since: the deadline, the keys, the providers.
        """
        job_id = None
        if error.code not in _LOG_IS_AWAY:
            with contextlib.suppress(CocoonError, TimeoutError):
                async with asyncio.timeout(LOOK_UP_S):
                    job_id = await self._find_job(request.command_id)
        if job_id is None:
            await self._refuse(request, error, traceparent)
        else:
            await self._existing(request, job_id, traceparent)

    async def _refuse(self, request: JobRequest, error: CocoonError, traceparent: str) -> None:
        update = decide.refused_update(request.job_id, error)
        await self._news(request.gateway_id, request.job_id, update, traceparent)

    async def _wait_or_refuse(
        self, request: JobRequest, traceparent: str, error: RateLimited, waited: Waiting | None
    ) -> None:
        """Queue the request and say so; one that has waited keeps its deadline."""
        if waited is not None:
            if not self.waiting.add(waited, first=True):
                await self._refuse_if_new(request, error, traceparent)
            return
        left_s = (request.not_after_ms - self._clock.now_ms()) / 1000
        wait_s = min(self._settings.waiting_s, left_s)
        deadline_s = self._clock.monotonic_s() + wait_s
        if self.waiting.add(Waiting(request, traceparent, deadline_s, error)):
            update = MatchUpdate(kind="waiting", job_id=request.job_id)
            await self._news(request.gateway_id, request.job_id, update, traceparent)
        else:
            await self._refuse_if_new(request, error, traceparent)

    # ---- what else is heard ----

    async def on_cancel(self, cancel: CancelJob) -> None:
        """Forget a waiting job, or start its lease's end."""
        if not self.waiting.remove(cancel.job_id):
            self._leases.on_cancel(cancel)

    def on_network_event(self, stored: StoredEvent) -> None:
        self._leases.on_network_event(self._memory.apply_network(stored))

    def on_shard_event(self, stored: StoredEvent) -> None:
        event = self._memory.apply_shard(stored)
        if stored.recorded_at_us >= self._began_us and stored.type in _ENDS:
            metrics.JOBS.inc(_ENDS[stored.type])  # not what a restart only reads again
        if isinstance(event, JobRequested):
            self._accepted_before.add(stored.causation_id, event.job_id)
        self._leases.on_shard_event(stored, event)

    async def resume(self) -> None:
        """Lease every running job again, with what its client wished; call it once, when the
        memory has caught up. Raises Unavailable.
        """
        running = sorted(self._memory.jobs)
        for first in range(0, len(running), RECALLED_AT_ONCE):
            for command in await self._find_requests(running[first : first + RECALLED_AT_ONCE]):
                self._memory.recall(command)
        self._memory.presume_alive(self._clock.monotonic_s())
        for job_id, state in tuple(self._memory.jobs.items()):
            self._leases.resume(job_id, state)

    def deaf(self) -> None:
        """The bus was away, or this process stood still: no silence counts from before now."""
        self._memory.presume_alive(self._clock.monotonic_s())
        self._leases.deaf()

    async def sweep(self) -> None:
        """End what is over, refuse who waited too long, try the waiting again."""
        self._leases.sweep()
        await asyncio.sleep(0)  # who was matched before and found its provider full comes first
        for late in self.waiting.expired(self._clock.monotonic_s()):
            await self._refuse_if_new(late.request, late.refusal, late.traceparent)
        busy: set[tuple[tuple[str, ...], str]] = set()  # nobody gets free during a sweep
        tries = 0
        for waiting in self.waiting.in_turn():
            wanted = (waiting.request.recipient_key_ids, waiting.request.model_id)
            if wanted in busy:
                continue
            if not self._somebody_is_free(*wanted):
                busy.add(wanted)
            elif self.waiting.take(waiting.request.job_id):  # unless it was cancelled meanwhile
                await self._answer(waiting.request, waiting.traceparent, waiting)
                tries += 1
                if tries >= WAITING_PER_SWEEP:
                    return

    def _somebody_is_free(self, key_ids: tuple[str, ...], model_id: str) -> bool:
        candidates = self._memory.candidates(key_ids, model_id, self._clock.monotonic_s())
        return any(c.alive and c.running < c.concurrency for c in candidates)


def _job_id_used() -> Conflict:
    return Conflict("this job id was used before; draw a new one", code="job_id_used")
