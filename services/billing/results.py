"""Results of providers: checked, decided, appended with their payment, acknowledged.

Live jobs are folded from the tails so that a result costs no query; whatever is not in memory is
read from the log, which alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import EventData, ProviderEnrolled
from cocoon.contracts.messages import ResultAck, SubmitResult
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.domain import job as jobs
from cocoon.domain.job import JobState, fold
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.read import stream_events
from cocoon.kernel.errors import Forbidden, SealingError, Unavailable
from cocoon.sealing.receipt import Receipt
from services.billing import decide

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

MAX_CONFLICTS = 8
JOB_NOT_COMMITTED = "job_not_committed"


class LiveJobs:
    """The running jobs of all account shards, folded from the tails and from own appends.

    A job's id is its client's choice, so two shards may each have one of the same id.
    """

    def __init__(self) -> None:
        self._states: dict[int, dict[str, JobState]] = {}  # by shard

    def get(self, job_id: str) -> list[tuple[int, JobState]]:
        """(shard, state) of every running job of this id."""
        return [(shard, jobs[job_id]) for shard, jobs in self._states.items() if job_id in jobs]

    def apply(self, stored: StoredEvent) -> None:
        """Fold an event of a job's stream; versions already folded change nothing."""
        aggregate, _, job_id = stored.stream.partition("/")
        if aggregate != "job":
            return
        states = self._states.setdefault(stored.shard, {})
        state = states.get(job_id, JobState())
        if stored.version != state.version + 1:
            return
        state = jobs.evolve(state, stored.decode())
        if state.status.is_terminal:
            states.pop(job_id, None)
        else:
            states[job_id] = state


class Results:
    """Settles what providers submit. One instance; many results at a time."""

    def __init__(self, appenders: dict[int, LogAppender], pool: Pool, live: LiveJobs) -> None:
        self._appenders, self._pool, self._live = appenders, pool, live
        self._identity_keys: dict[str, VerifyKey] = {}

    def on_network_event(self, stored: StoredEvent) -> None:
        event = stored.decode()
        if isinstance(event, ProviderEnrolled):
            self._identity_keys[event.provider_id] = VerifyKey(bytes.fromhex(event.identity_key))

    def is_live(self, result: SubmitResult) -> bool:
        """Whether memory holds the job in the result's epoch: it costs no query."""
        return any(state.epoch == result.epoch for _, state in self._live.get(result.job_id))

    async def on_submit_result(self, result: SubmitResult, traceparent: str) -> ResultAck:
        """Settle or reject a result and say which.

        Raises Unavailable while its match is not in the log yet (try again with a delay),
        BadRequest or Forbidden for a result that nobody asked for.
        """
        await self._check_signature(result)
        command = decide.settle_command(result)
        known = self._meant(self._live.get(result.job_id), result)
        for _ in range(MAX_CONFLICTS):
            if known is None or known[1].epoch != result.epoch:
                known = await self._read(result)
            shard, state = known
            if result.epoch > state.epoch and not state.status.is_terminal:
                # Dispatched at once, its match on its way: refused, it would never be paid.
                raise Unavailable("the match is not in the log yet", code=JOB_NOT_COMMITTED)
            events = decide_settle_result(state, command)
            if not events:
                return decide.ack_for(result, (), state)
            item = decide.settle_item(command, state, events, traceparent)
            outcome = await self._appenders[shard].append(item)
            if isinstance(outcome, Appended):
                for stored in outcome.events:
                    self._live.apply(stored)
                decided = [stored.decode() for stored in outcome.events]
                return decide.ack_for(result, decided, state)
            known = None  # somebody was first; decide again on what the log says now
        raise Unavailable("the job keeps changing; submit the result again")

    async def _check_signature(self, result: SubmitResult) -> None:
        key = self._identity_keys.get(result.provider_id)
        if key is None:
            key = await self._read_identity(result.provider_id)
        try:
            key.verify(result.signed_bytes(), bytes.fromhex(result.signature))
        except BadSignatureError:
            raise Forbidden("the result is not signed by the provider's identity key") from None

    async def _read_identity(self, provider_id: str) -> VerifyKey:
        """The key of a provider whose enrolment the tail has not brought yet.

        Raises Forbidden if the log has none: put back, its results would fill the queue's window
        and nobody would be paid.
        """
        async with acquired(self._pool) as conn:
            stored = await stream_events(conn, NETWORK_SHARD, f"provider/{provider_id}")
        for event in stored:
            self.on_network_event(event)
        key = self._identity_keys.get(provider_id)
        if key is None:
            raise Forbidden("this provider never enrolled; enrol before submitting results")
        return key

    async def _read(self, result: SubmitResult) -> tuple[int, JobState]:
        """The job's shard and state from the log. Raises Unavailable if it is not there yet."""
        found = []
        async with acquired(self._pool) as conn:
            for shard in self._appenders:
                events = await stream_events(conn, shard, f"job/{result.job_id}")
                if events:
                    found.append((shard, fold(_decoded(events))))
        if not found:
            raise Unavailable("the job is not in the log yet", code=JOB_NOT_COMMITTED)
        return self._meant(found, result) or found[0]

    def _meant(
        self, found: Sequence[tuple[int, JobState]], result: SubmitResult
    ) -> tuple[int, JobState] | None:
        """Of the jobs of one id, the one whose request the receipt names."""
        if len(self._appenders) == 1:
            return found[0] if found else None
        req_hash = _req_hash(result)
        for shard, state in found:
            if state.request is not None and state.request.req_hash == req_hash:
                return shard, state
        return None


def _req_hash(result: SubmitResult) -> str:
    """What the receipt says that it answers; nothing for one that the decider will refuse."""
    try:
        return Receipt.decode(bytes.fromhex(result.receipt)).req_hash.hex()
    except SealingError:
        return ""


def _decoded(events: Sequence[StoredEvent]) -> list[EventData]:
    return [stored.decode() for stored in events]
