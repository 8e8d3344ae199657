"""One job's run: feeds the machine from the mailbox and performs its actions, in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Final

import nats.errors

from cocoon.bus.sealed import put_sealed
from cocoon.contracts import messages, subjects
from cocoon.contracts.messages import (
    MAX_INLINE_ENVELOPE_BYTES,
    CancelJob,
    DispatchReport,
    JobRequest,
    MatchUpdate,
)
from cocoon.kernel.errors import CocoonError, NotFound, RateLimited, Unavailable
from cocoon.kernel.ids import AccountId, named_command_id, request_command_id
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.tracing import inject
from services.gateway import actions as act
from services.gateway import jobs
from services.gateway.frames import DispatchAnswer, Item, Mailbox, Tick

if TYPE_CHECKING:
    from services.gateway.admission import Slot
    from services.gateway.decide import Relay
    from services.gateway.handlers import Gateway, JobResponse, RunJob

log = get_logger("cocoon.gateway")
_FIRST_FETCH_PAUSE_S: Final = 0.05


class JobRun:
    """One use each: `run` it to the job's end. `now_ms` below is the loop's monotonic time."""

    def __init__(
        self, gateway: Gateway, request: RunJob, response: JobResponse, slot: Slot, box: Mailbox,
        relay: Relay,
    ) -> None:  # fmt: skip
        self._gateway, self._request, self._response = gateway, request, response
        self._slot, self._box, self._relay = slot, box, relay
        self._job_id = request.header.job_id.hex()
        self._shard = gateway.settings.shard_of(request.key.account_id)
        self._traceparent = inject() or request.traceparent
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms = 0
        self._grace: asyncio.TimerHandle | None = None
        self._began_s = time.perf_counter()
        self._first_frame_s = 0.0
        self._failure: CocoonError | None = None
        self._unanswered = 0  # the epoch of a dispatch that has had no answer yet
        self._silence: asyncio.TimerHandle | None = None
        self._outcome = "abandoned"
        self._looking = False

    async def run(self) -> None:
        watcher = self._response.watch(self._client_left)
        try:
            await self._perform(self._relay.begin())
            while not self._relay.done:
                self._arm()
                wanted: list[act.Action] = []
                for item in await self._box.take():
                    wanted += self._feed(item)
                await self._perform(wanted)
                self._slot.answer.keep(self._relay.held_bytes + self._box.waiting_bytes)
        finally:
            watcher.cancel()
            for timer in (self._timer, self._grace, self._silence):
                if timer is not None:
                    timer.cancel()
            for task in self._tasks:
                task.cancel()
            metrics.JOB_SECONDS.observe(time.perf_counter() - self._began_s)
            tell = log.debug if self._outcome == "complete" else log.info
            tell(
                "job_relayed",
                job_id=self._job_id,
                outcome=self._outcome,
                duration_ms=int((time.perf_counter() - self._began_s) * 1000),
                envelope_bytes=len(self._request.envelope),
            )
        if self._failure is not None:
            raise self._failure

    def _client_left(self) -> None:
        """One that has had nothing yet may come back for its job: a line broke, or it restarts."""
        if self._relay.started:
            self._box.client_gone()
        else:
            now_s = asyncio.get_running_loop().time()
            self._box.awaited_until_s = now_s + self._gateway.settings.return_grace_s
            self._end_grace()

    def _end_grace(self) -> None:
        """Nobody came: leave. While another line is waited for, this one goes on beside it."""
        loop = asyncio.get_running_loop()
        now_s, until_s = loop.time(), self._gateway.switchboard.awaited_until_s(self._job_id)
        if until_s <= now_s:
            self._box.client_gone()
        else:
            at_s = min(until_s, now_s + self._gateway.settings.return_grace_s)
            self._grace = loop.call_at(at_s, self._end_grace)

    @property
    def _alone(self) -> bool:
        """Whether no other line at this gateway has a client that waits or may come back."""
        others = self._gateway.switchboard.awaited_until_s(self._job_id, but=self._box)
        return others <= asyncio.get_running_loop().time()

    # ---- in ----

    def _feed(self, item: Item) -> list[act.Action]:
        relay = self._relay
        if isinstance(item, act.Frame):
            if not self._first_frame_s:
                self._first_frame_s = time.perf_counter()
            return relay.on_frame(item, now_ms())
        if isinstance(item, MatchUpdate):
            return self._on_update(item)
        if isinstance(item, DispatchAnswer):
            return self._on_answer(item)
        if isinstance(item, Tick):
            self._timer = None
            return relay.on_time(now_ms(), alone=self._alone)
        if isinstance(item, act.LogView):
            self._looking = False
            return self._listen(relay.on_log(item, now_ms()))
        return relay.on_disconnect(alone=self._alone)

    def _on_update(self, update: MatchUpdate) -> list[act.Action]:
        relay = self._relay
        self._slot.answered()
        if update.kind == "matched" and update.quote is not None:
            match = act.Match(
                update.epoch, update.provider_id, update.quote.to_canonical().decode(),
                update.quote_id, update.evidence_id,
            )  # fmt: skip
            return self._listen(relay.on_matched(match, now_ms()))
        if update.kind == "committed":
            return relay.on_committed(update.epoch, update.provider_id)
        if update.kind == "existing":
            same_job = update.job_id == self._job_id  # the sealed bytes hold the job's id
            return relay.on_existing(same_job and update.req_hash in ("", self._request.req_hash))
        if update.kind == "waiting":
            return relay.on_waiting(now_ms())
        if update.kind == "refused":
            return relay.on_refused(update.error)
        return relay.on_ended(update.error)

    def _on_answer(self, answer: DispatchAnswer) -> list[act.Action]:
        """The first answer to a dispatch counts, be it the provider's or that none came in time."""
        if answer.epoch != self._unanswered:
            return []
        self._unanswered = 0
        if self._silence is not None:
            self._silence.cancel()
        metrics.DISPATCHES.inc(answer.outcome)
        return self._relay.on_dispatch(*answer)

    def _listen(self, actions: list[act.Action]) -> list[act.Action]:
        """Let the frames of the live match, and only these, into the mailbox."""
        match = self._relay.live_match
        self._box.live = (match.provider_id, str(match.epoch)) if match else None
        return actions

    def _arm(self) -> None:
        """One timer a job; it moves only when something is due earlier."""
        at_ms = self._relay.wake_at_ms
        if self._timer is not None:
            if at_ms >= self._timer_at_ms:
                return
            self._timer.cancel()
        self._timer_at_ms = at_ms
        delay_s = max(0.001, (at_ms - now_ms()) / 1000)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._box.put, Tick())

    # ---- out ----

    async def _perform(self, actions: list[act.Action]) -> None:
        """Do what the machine asks; bytes that follow each other go out as one write."""
        parts: list[bytes] = []
        for action in actions:
            if isinstance(action, act.Send):
                parts.append(action.data)
                continue
            if parts:
                await self._send(parts, last=isinstance(action, act.Finish))
                parts = []
                if isinstance(action, act.Finish):
                    continue
            await self._do(action)
        if parts:
            await self._send(parts)

    async def _do(self, action: act.Action) -> None:
        match action:
            case act.Ask():
                body = self._job_request().model_dump_json().encode()
                subject = subjects.request_job(self._shard)
                await self._gateway.publish(subject, body, self._traceparent)
            case act.Dispatch(match):
                self._spawn(self._dispatch(match))
            case act.Report(epoch, outcome, code):
                report = DispatchReport(
                    job_id=self._job_id, epoch=epoch, outcome=outcome, code=code
                )
                body = report.model_dump_json().encode()
                await self._gateway.publish(subjects.report_dispatch(self._shard), body)
            case act.CancelAtMatcher(epoch):
                await self._gateway.cancel(self._shard, self._job_id, "", epoch)
            case act.CancelAtProvider(provider_id, epoch):
                body = CancelJob(job_id=self._job_id, epoch=epoch).model_dump_json().encode()
                await self._gateway.publish(subjects.cancel_job(provider_id), body)
            case act.Start(match, length):
                await self._start(match, length)
            case act.Fetch():
                await self._fetch(action)
            case act.Lookup():
                if not self._looking:
                    self._looking = True
                    self._spawn(self._look_up())
            case act.Finish():
                self._outcome = "complete"
                await self._response.finish()
            case act.Fail(error, truncated):
                self._outcome = "truncated" if truncated else "failed"
                metrics.REFUSALS.inc(error.code)
                if not truncated:
                    self._failure = error

    async def _start(self, match: act.Match, length: int | None) -> None:
        now_s = time.perf_counter()
        metrics.FIRST_TOKEN_SECONDS.observe(now_s - self._began_s)
        if self._first_frame_s:
            metrics.FIRST_BYTE_HELD_SECONDS.observe(now_s - self._first_frame_s)
        await self._response.start(response_headers(self._job_id, match), length)

    async def _send(self, parts: list[bytes], *, last: bool = False) -> None:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        timeout_s = self._gateway.settings.send_timeout_s
        if await self._response.send_within(data, timeout_s, last=last):
            metrics.FRAMES.inc("relayed")
            if last:
                self._outcome = "complete"
        else:
            self._box.client_gone()  # slower than the bound: the job is cancelled

    async def _dispatch(self, match: act.Match) -> None:
        """Send the envelope; the answer comes on the job's own subject, or its time runs out."""
        gateway, request = self._gateway, self._request
        self._unanswered = match.epoch
        headers = {
            messages.H_JOB: self._job_id,
            messages.H_EPOCH: str(match.epoch),
            messages.H_REQ_HASH: request.req_hash,
            messages.H_GATEWAY: gateway.gateway_id,
            messages.H_QUOTE: match.quote_json,
        }
        if self._traceparent:
            headers[messages.H_TRACEPARENT] = self._traceparent
        body, silent = request.envelope, DispatchAnswer(match.epoch, "silent", "none")
        try:
            if len(body) > MAX_INLINE_ENVELOPE_BYTES:
                digest = await put_sealed(gateway.js, match.provider_id, body)
                headers[messages.H_SEALED] = digest
                body = b""
            subject = subjects.run_job(match.provider_id)
            await gateway.nc.publish(subject, body, headers=headers)
        except (nats.errors.Error, TimeoutError, CocoonError):
            self._box.put(silent)
            return
        if self._silence is not None:
            self._silence.cancel()
        self._silence = asyncio.get_running_loop().call_later(
            gateway.settings.dispatch_timeout_s, self._box.put, silent
        )

    async def _look_up(self) -> None:
        request = self._request
        try:
            record = await jobs.read_job(self._gateway.pool, self._shard, self._job_id)
            view = jobs.view(
                record, request.key.account_id, request.req_hash, self._gateway.gateway_id
            )
        except Exception as error:
            log.warning("job_lookup_failed", job_id=self._job_id, exc_info=error)
            view = act.LogView(None)
        self._box.put(view)

    async def _fetch(self, action: act.Fetch) -> None:
        """Send the rest of the response from SEALED, where it may still be on its way."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._gateway.settings.sealed_timeout_s
        pause_s = _FIRST_FETCH_PAUSE_S
        offset = action.offset
        self._box.drop_frames()
        self._slot.answer.keep(self._relay.held_bytes)
        while True:
            if self._box.gone:
                await self._perform(self._relay.on_disconnect())
                return
            stored = self._gateway.stored_bytes(
                action.match.provider_id, action.blob_hash.hex(), offset, action.total,
                self._slot.answer,
            )  # fmt: skip
            try:
                async with contextlib.aclosing(stored) as pieces:
                    async for data in pieces:
                        if self._box.gone:
                            break
                        offset += len(data)
                        give_up_at = loop.time() + self._gateway.settings.sealed_timeout_s
                        await self._perform(self._relay.on_filled(data))
                    else:
                        return
                    continue
            except (NotFound, Unavailable, RateLimited):
                if loop.time() >= give_up_at:
                    await self._perform(self._relay.on_fill_ended())
                    return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def _job_request(self) -> JobRequest:
        request, header = self._request, self._request.header
        account = request.key.account_id
        if request.idempotency_key:
            command_id = request_command_id(AccountId(account), request.idempotency_key)
        else:
            command_id = named_command_id("request-job", account, self._job_id)
        return JobRequest(
            gateway_id=self._gateway.gateway_id,
            command_id=command_id,
            job_id=self._job_id,
            account_id=account,
            api_key_id=request.key.api_key_id,
            model_id=header.model_id.hex(),
            req_hash=request.req_hash,
            envelope_bytes=len(request.envelope),
            max_price_nanoton=header.max_price_nanoton,
            max_input_tokens=header.max_input_tokens,
            max_output_tokens=header.max_output_tokens,
            not_after_ms=header.not_after_ms,
            policy_hash=header.policy_hash.hex(),
            recipient_key_ids=tuple(key_id.hex() for key_id in header.key_ids),
            stream=header.stream,
            preferences=request.preferences,
            affinity=request.affinity,
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def response_headers(job_id: str, match: act.Match) -> list[tuple[bytes, bytes]]:
    """The `x-cocoon-*` headers of an answer: who answers, under which match, at what price."""
    return [
        (b"x-cocoon-job-id", job_id.encode()),
        (b"x-cocoon-provider", match.provider_id.encode()),
        (b"x-cocoon-epoch", b"%d" % match.epoch),
        (b"x-cocoon-quote-id", match.quote_id.encode()),
        (b"x-cocoon-quote", match.quote_json.encode()),
        (b"x-cocoon-evidence-id", match.evidence_id.encode()),
    ]


def now_ms() -> int:
    """Monotonic milliseconds."""
    return time.monotonic_ns() // 1_000_000
