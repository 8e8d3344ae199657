"""A provider's own questions: what it earned, which jobs it lost, what a price would bring.

They have a pool of connections of their own, and few are answered at once: payments go first.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from cocoon.contracts.books import (
    DAY_MS,
    Earnings,
    EarningsRequest,
    InTransit,
    LostJob,
    LostJobs,
    LostRequest,
    SimulateRequest,
)
from cocoon.contracts.commands import ExpireLease, RequestJob, decode_command
from cocoon.contracts.messages import Reply
from cocoon.domain.job import JobState, evolve
from cocoon.domain.losing import Decision, Lost, lost_by
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.losing import lost_page
from cocoon.eventlog.read import commands_of, first_position_since, head, stream_events
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import BadRequest, Forbidden, RateLimited
from cocoon.kernel.pace import Buckets
from services.billing import provider_store as store
from services.billing.market import Market
from services.billing.replying import replied
from services.billing.simulating import Simulator

if TYPE_CHECKING:
    from cocoon.contracts.books import EarnedBy
    from cocoon.eventlog.connection import Connection, Pool

AT_ONCE: Final = 2  # requests of one provider
SIMULATIONS_PER_S, SIMULATIONS_AT_ONCE, REMEMBERED = 0.1, 10, 16_384  # of one; providers counted
TRANSIT_FRESH_S: Final = 2.0  # one look at all running jobs serves everybody for so long
_PROVIDER: Final = re.compile(r"prov_[0-9a-f]{32}\Z")
_PAGE: Final = re.compile(r"(\d{1,4})\.(\d{1,16})\Z")


class ProviderBooks:
    """Answers `rpc.books.<provider_id>.<verb>`. One event loop."""

    def __init__(self, pool: Pool, shards: Sequence[int], market: Market, clock: Clock) -> None:
        self._pool, self._shards, self._market, self._clock = pool, tuple(shards), market, clock
        self._simulator = Simulator(pool, shards, market, clock)
        self._asking: Counter[str] = Counter()
        self._simulations = Buckets(SIMULATIONS_PER_S, SIMULATIONS_AT_ONCE, REMEMBERED)
        self._transit: dict[str, InTransit] = {}
        self._transit_s = float("-inf")
        self._one_look = asyncio.Lock()
        self._verbs: dict[str, Callable[[str, bytes], Awaitable[str]]] = {
            "earnings": self._earnings,
            "lost": self._lost,
            "simulate": self._simulate,
        }

    async def answer(self, provider_id: str, verb: str, body: bytes) -> Reply:
        """Run one request; every refusal is a Reply."""
        return await replied(self._run(provider_id, verb, body))

    async def _run(self, provider_id: str, verb: str, body: bytes) -> str:
        if not _PROVIDER.match(provider_id):
            raise Forbidden("this subject does not name a provider", code="identity_mismatch")
        work = self._verbs.get(verb)
        if work is None:
            raise BadRequest(f"billing has no request {verb} for providers")
        if self._asking[provider_id] >= AT_ONCE:
            raise RateLimited(
                "two of this provider's questions are being answered; ask again after them",
                code="too_many_questions",
                retry_after_s=1,
            )
        self._asking[provider_id] += 1
        try:
            return await work(provider_id, body)
        finally:
            self._asking[provider_id] -= 1
            if not self._asking[provider_id]:
                del self._asking[provider_id]

    # ---- earnings ----

    async def _earnings(self, provider_id: str, body: bytes) -> str:
        asked = EarningsRequest.model_validate_json(body)
        if asked.receipts and asked.by != "job":
            raise BadRequest("receipts belong to jobs; ask by job")
        transit = await self._in_transit(provider_id)
        today = self._clock.now_ms() // DAY_MS
        async with (
            acquired(self._pool) as conn,
            conn.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows, following = await self._rows(conn, provider_id, asked)
            refused, results = await store.refused(
                conn, self._shards, provider_id, store.day_start_us(asked.since_day)
            )
            return Earnings(
                provider_id=provider_id,
                balance_nanoton=await store.balance(conn, self._shards, provider_id),
                total=await store.total(conn, provider_id, asked.since_day),
                today=await store.total(conn, provider_id, today),
                rows=tuple(self._named(row) for row in rows),
                next=following,
                in_transit=transit,
                refused=tuple(refused),
                refused_results=results,
            ).to_canonical().decode()  # fmt: skip

    async def _rows(
        self, conn: Connection, provider_id: str, asked: EarningsRequest
    ) -> tuple[list[EarnedBy], str]:
        """A page, and the token of the next: empty at the end."""
        limit, since = asked.limit, asked.since_day
        if asked.by == "day":
            before = _number(asked.after, "day") if asked.after else 10**9
            days = await store.by_day(conn, provider_id, since, before, limit + 1)
            return days[:limit], str(days[limit - 1].day) if len(days) > limit else ""
        if asked.by == "model":
            after = asked.after.removeprefix("m") if asked.after else None
            models = await store.by_model(conn, provider_id, since, after, limit + 1)
            more = f"m{models[limit - 1][0]}" if len(models) > limit else ""
            return [row for _, row in models[:limit]], more
        return await self._jobs(conn, provider_id, asked)

    async def _jobs(
        self, conn: Connection, provider_id: str, asked: EarningsRequest
    ) -> tuple[list[EarnedBy], str]:
        found: list[EarnedBy] = []
        for shard, before in self._pages(asked.after):
            first = await first_position_since(conn, shard, store.day_start_us(asked.since_day))
            found += await store.by_job(
                conn, provider_id, shard, first, before or 2**53, asked.limit + 1 - len(found),
                receipts=asked.receipts,
            )  # fmt: skip
            if len(found) > asked.limit:
                last = found[asked.limit - 1]
                return found[: asked.limit], f"{last.shard}.{last.position}"
        return found, ""

    def _pages(self, after: str) -> list[tuple[int, int]]:
        """(shard, the position before which to read on; 0: from its end), in order."""
        if not after:
            return [(shard, 0) for shard in self._shards]
        page = _PAGE.match(after)
        if page is None or int(page[1]) not in self._shards:
            raise BadRequest("`after` is not what an earlier answer gave as `next`")
        at = self._shards.index(int(page[1]))
        return [(int(page[1]), int(page[2])), *((s, 0) for s in self._shards[at + 1 :])]

    def _named(self, row: EarnedBy) -> EarnedBy:
        name = self._market.name_of(row.model_id) if row.model_id else ""
        return row.model_copy(update={"model": name}) if name else row

    async def _in_transit(self, provider_id: str) -> InTransit:
        async with self._one_look:
            if self._clock.monotonic_s() - self._transit_s > TRANSIT_FRESH_S:
                async with acquired(self._pool) as conn:
                    self._transit = await store.in_transit(conn)
                self._transit_s = self._clock.monotonic_s()
        return self._transit.get(provider_id, InTransit())

    # ---- jobs that went elsewhere ----

    async def _lost(self, provider_id: str, body: bytes) -> str:
        asked = LostRequest.model_validate_json(body)
        async with acquired(self._pool) as conn:
            if asked.job_id is not None:
                answer = await self._lost_job(conn, provider_id, asked.job_id)
            else:
                answer = await self._lost_page(conn, provider_id, asked)
        return answer.to_canonical().decode()

    async def _lost_page(self, conn: Connection, provider_id: str, asked: LostRequest) -> LostJobs:
        """One bounded piece of one shard: an answer without rows may have a next one."""
        pages = self._pages(asked.after)
        shard, before = pages[0]
        page = await lost_page(
            conn, shard, provider_id, since_us=asked.since_ms * 1000, before=before,
            limit=asked.limit, models=self._market.own_models(provider_id),
        )  # fmt: skip
        following = f"{shard}.{page.before}" if page.before else ""
        if not following and len(pages) > 1:
            end = (await head(conn, pages[1][0])).position + 1
            following = f"{pages[1][0]}.{end}"
        return LostJobs(rows=tuple(map(_told, page.items)), next=following)

    async def _lost_job(self, conn: Connection, provider_id: str, job_id: str) -> LostJobs:
        found: list[Lost] = []
        models = self._market.own_models(provider_id)
        for shard in self._shards:
            events = await stream_events(conn, shard, f"job/{job_id}")
            state, decisions = JobState(), list[Decision]()
            for stored in await commands_of(conn, shard, events):
                command = decode_command(stored.data)
                if isinstance(command, RequestJob | ExpireLease):
                    decisions.append((state, command))
                for event in events:
                    if stored.first_position <= event.position <= stored.last_position:
                        state = evolve(state, event.decode())
            found += lost_by(provider_id, decisions, models)
        done = await store.outcome(conn, self._shards, provider_id, job_id)
        told = ""
        if done is not None:
            paid = done[0] == "paid"
            told = (
                f"this provider ended the job and earned {done[1]} nanoTON" if paid
                else f"this provider's result was refused: {done[1]}"
            )  # fmt: skip
        return LostJobs(rows=tuple(map(_told, found)), told=told)

    # ---- what a price would bring ----

    async def _simulate(self, provider_id: str, body: bytes) -> str:
        asked = SimulateRequest.model_validate_json(body)
        if not self._simulations.take(provider_id, self._clock.monotonic_s()):
            raise RateLimited(
                "this provider simulates too often; once in ten seconds is answered",
                code="too_many_simulations",
                retry_after_s=10,
            )
        return (await self._simulator.simulate(provider_id, asked)).to_canonical().decode()


def _told(lost: Lost) -> LostJob:
    return LostJob(
        job_id=lost.job_id, at_ms=lost.at_ms, model_id=lost.model_id, reason=lost.reason,
        margin_bps=lost.margin_bps, told=lost.sentence[:500],
    )  # fmt: skip


def _number(text: str, what: str) -> int:
    if not text.isdigit() or len(text) > 9:
        raise BadRequest(f"`after` is not a {what} that an earlier answer gave as `next`")
    return int(text)
