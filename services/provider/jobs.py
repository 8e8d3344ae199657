"""Which jobs this agent takes, runs and remembers: dispatch in, accepted or a coarse code out.

A repeat of a job gets the bytes of its one run, under the route of the latest lease.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pydantic import ValidationError

from cocoon.bus.sealed import get_sealed
from cocoon.contracts import messages as m
from cocoon.contracts.events import Quote
from cocoon.contracts.messages import DispatchReply
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import BadRequest, CocoonError, SealingError
from cocoon.kernel.ids import is_job_id
from cocoon.sealing import MAX_ENVELOPE_BYTES, Status, outside_code
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.tracing import span
from services.provider.answering import check_price, spooled_bytes
from services.provider.enclave import Enclave
from services.provider.frames import FrameSender, Route
from services.provider.journal import SpoolHead
from services.provider.models import ServedModel
from services.provider.running import JobRun, RunningJob, SealedResult
from services.provider.spool import Spool
from services.provider.submitting import Submitter
from services.provider.table import ModelTable

if TYPE_CHECKING:
    from nats.aio.client import Client

_log = get_logger("cocoon.provider.jobs")
MAX_CANCELS: Final = 1024
ACCEPTED: Final = DispatchReply(accepted=True)
JOB_MAX_BYTES: Final = 16 * 1024 * 1024
_WORDS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The headers of a run_job request. Raises ValueError from `read` for malformed ones."""

    job_id: str
    route: Route
    req_hash: bytes
    quote: Quote
    sealed_digest: str
    traceparent: str

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Dispatch:
        job_id, route = route_of(headers)
        try:
            req_hash, quote = bytes.fromhex(headers[m.H_REQ_HASH]), _quote(headers[m.H_QUOTE])
        except (KeyError, ValidationError):
            raise ValueError("a run_job header is missing or malformed") from None
        digest = headers.get(m.H_SEALED, "")
        if len(req_hash) != 32:
            raise ValueError("a run_job header is malformed")
        if digest and (len(digest) != 64 or not _WORDS.issuperset(digest)):
            raise ValueError("a run_job header is malformed")
        traceparent = headers.get(m.H_TRACEPARENT, "")
        return cls(job_id, route, req_hash, quote, digest, traceparent)


def route_of(headers: Mapping[str, str]) -> tuple[str, Route]:
    """The job of a dispatch, and where its answer goes. Raises ValueError for malformed headers."""
    try:
        job_id, gateway, epoch = headers[m.H_JOB], headers[m.H_GATEWAY], int(headers[m.H_EPOCH])
    except KeyError:
        raise ValueError("a run_job header is missing") from None
    named = is_job_id(job_id) and 1 <= epoch < 2**32
    if not named or not gateway or len(gateway) > 64 or not _WORDS.issuperset(gateway):
        raise ValueError("a run_job header is malformed")
    return job_id, Route(gateway, epoch)


@lru_cache(maxsize=64)
def _quote(text: str) -> Quote:
    """A provider's jobs cite few quotes. Raises ValidationError."""
    return Quote.model_validate_json(text)


class Jobs:
    """The agent's table of jobs. Every task that it starts is in `_tasks` until it ends."""

    def __init__(
        self, nc: Client, provider_id: str, enclave: Enclave, models: ModelTable, spool: Spool,
        submitter: Submitter, sender: FrameSender, clock: Clock, *, job_timeout_s: float,
        job_max_bytes: int = JOB_MAX_BYTES,
    ) -> None:  # fmt: skip
        self._nc = nc
        self._provider_id = provider_id
        self._enclave = enclave
        self._models = models
        self._spool = spool
        self._submitter = submitter
        self._sender = sender
        self._clock = clock
        self._job_timeout_s = job_timeout_s
        self._job_max_bytes = job_max_bytes
        self._running: dict[str, RunningJob] = {}
        self._cancels: dict[str, int] = {}  # of jobs that do not run yet, or no more; oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False
        self.on_crowding: Callable[[], None] | None = None  # a model has become full, or free again

    @property
    def taking_jobs(self) -> bool:
        return not self.draining and self._models.taking_jobs

    # ---- what the bus asks ----

    async def dispatch(self, headers: Mapping[str, str], body: bytes) -> DispatchReply:
        """Take a job, or answer why not. Authenticates before it accepts."""
        try:
            dispatch = Dispatch.read(headers)
            await self._dispatch(dispatch, body)
        except SealingError as error:
            code = outside_code(error.code)
        except (BadRequest, ValueError):
            code = "bad_request"
        except CocoonError:
            code = "busy"  # SEALED or the key holder did not answer: another may do better
        else:
            return ACCEPTED
        metrics.REFUSALS.inc(code)
        _log.info("dispatch_refused", code=code)
        return DispatchReply(accepted=False, code=code)  # type: ignore[arg-type]

    def cancel(self, job_id: str, epoch: int) -> None:
        """Stop a running job (epoch 0: whatever its epoch). Its receipt says what was delivered.

        One that is being opened, or whose dispatch comes a moment later, stops as it begins.
        """
        job = self._running.get(job_id)
        if job is None:
            self._cancels[job_id] = epoch
            if len(self._cancels) > MAX_CANCELS:
                del self._cancels[next(iter(self._cancels))]
        elif epoch in (0, job.route.epoch):
            job.cancel()

    def running_pairs(self) -> list[tuple[str, int]]:
        return [(job_id, job.route.epoch) for job_id, job in self._running.items()]

    @property
    def running(self) -> int:
        return len(self._running)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish, then cancel what is left."""
        self.draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for job in self._running.values():
            job.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await self.end()

    async def end(self) -> None:
        """Stop everything at once. What has no receipt yet gets none."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- dispatch ----

    async def _dispatch(self, dispatch: Dispatch, body: bytes) -> None:
        if self._is_repeat(dispatch):
            return
        if self.draining or self._spool.is_full:
            _busy("This agent takes no new jobs now.")
        model = self._model_of(dispatch)
        if not model.takes_jobs:
            _busy("This model takes no new jobs now.")
        if model.is_full:
            self._crowding()
            _busy("This model has as many jobs as it can.")
        model.join()
        if model.is_full:
            self._crowding()
        began = False
        try:
            began = await self._open(dispatch, body, model)
        finally:
            if not began:
                self._leave(model)

    def _model_of(self, dispatch: Dispatch) -> ServedModel:
        model = self._models.of(dispatch.quote.model_id)
        if model is None:
            raise BadRequest("the match is for a model that this agent does not serve")
        return model

    def _leave(self, model: ServedModel) -> None:
        was_full = model.is_full
        model.leave()
        if was_full:
            self._crowding()

    def _crowding(self) -> None:
        if self.on_crowding is not None:
            self.on_crowding()

    def _is_repeat(self, dispatch: Dispatch) -> bool:
        """Whether the very envelope that the dispatch names is running here or is spooled.

        Raises BadRequest if another one is, under the same job id: a shard refuses an id that it
        has seen, and does not know the other shards'.
        """
        job = self._running.get(dispatch.job_id)
        if job is not None:
            _same_request(job.opened.req_hash, dispatch)
            self._reroute(job, dispatch)
            return True
        item = self._spool.of_job(dispatch.job_id)
        if item is not None:
            _same_request(bytes.fromhex(item.head.req_hash), dispatch)
            self._start(self._resend(dispatch, item.head.blob_hash))
            return True
        return False

    def _reroute(self, job: RunningJob, dispatch: Dispatch) -> None:
        """A later lease, or another gateway, asks for the job that runs already."""
        if dispatch.route.epoch < job.route.epoch or dispatch.route == job.route:
            return
        self._check_terms(dispatch, job.opened.header.model_id, self._model_of(dispatch))
        check_price(job.opened.header, dispatch.quote)
        job.route, job.quote, job.rerouted = dispatch.route, dispatch.quote, True

    async def _open(self, dispatch: Dispatch, body: bytes, model: ServedModel) -> bool:
        """Returns whether a job has begun, which keeps the model's place until its end."""
        envelope = body
        if dispatch.sealed_digest:
            envelope = await get_sealed(self._nc, self._provider_id, dispatch.sealed_digest)
        if len(envelope) > MAX_ENVELOPE_BYTES:
            raise BadRequest("a sealed request is at most 8 MiB")
        opened, evidence_id = await self._enclave.open(envelope, req_hash=dispatch.req_hash)
        if self.draining:
            _busy("This agent takes no new jobs now.")
        header, enc = opened.header, opened.slot.enc
        if header.job_id.hex() != dispatch.job_id:
            raise BadRequest("the dispatch names another job than the envelope")
        self._check_terms(dispatch, header.model_id, model)
        now_ms = self._clock.now_ms()
        kept_bytes = spooled_bytes(opened, self._job_max_bytes)
        if not self._spool.has_room(kept_bytes):
            _busy("The disk has no room for this job's result.")
        other = self._running.get(dispatch.job_id)
        if other is not None:  # it began while this one was being opened
            _same_request(other.opened.req_hash, dispatch)
        known = self._enclave.replay.begin(
            header.job_id, enc, req_hash=opened.req_hash, not_after_ms=header.not_after_ms,
            now_ms=now_ms,
        )  # fmt: skip
        if known is not None:
            if known.outcome is not None:
                self._start(self._resend(dispatch, known.outcome))
            elif not self._is_repeat(dispatch):
                _busy("This job's result is not at hand.")
            return False
        job = RunningJob(
            opened, evidence_id, dispatch.route, dispatch.quote, now_ms, dispatch.traceparent
        )
        job.cancelled = self._cancels.pop(dispatch.job_id, None) in (0, dispatch.route.epoch)
        run = JobRun(
            job, self._enclave, model, self._sender.send, self._clock,
            job_timeout_s=self._job_timeout_s, max_bytes=self._job_max_bytes,
        )  # fmt: skip
        run.begin()  # before the reply goes out: the first token waits for the engine alone
        self._spool.reserve(dispatch.job_id, kept_bytes)
        self._running[dispatch.job_id] = job
        metrics.IN_FLIGHT.inc()
        self._start(self._run(job, run, model))
        return True

    def _check_terms(self, dispatch: Dispatch, model_id: bytes, model: ServedModel) -> None:
        """The match must cite the request's model, at prices that this agent offers for it."""
        quote = dispatch.quote
        prices = (
            quote.input_nanoton_per_mtok,
            quote.cached_input_nanoton_per_mtok,
            quote.output_nanoton_per_mtok,
        )
        taken = model.prices.takes(prices, self._clock.monotonic_s())
        if model_id != model.id_bytes or not taken:
            raise BadRequest("the match cites a quote that this agent does not offer")

    # ---- running ----

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: RunningJob, run: JobRun, model: ServedModel) -> None:
        began_s = self._clock.monotonic_s()
        try:
            with span("provider.run_job", job.traceparent, {"job_id": job.job_id}):
                result = await run.run()
                self._count(result, self._clock.monotonic_s() - began_s)
                model.count(result.status, result.counts)
                await self._deliver(job, result, model)
        except Exception as error:  # noqa: BLE001 - one broken job must not stop the agent
            _log.error("job_broke", job_id=job.job_id, exc_info=error)
        finally:
            self._forget(job, model)

    def _forget(self, job: RunningJob, model: ServedModel) -> None:
        if self._running.get(job.job_id) is job:
            del self._running[job.job_id]
            self._leave(model)
            self._spool.release(job.job_id)
            metrics.IN_FLIGHT.dec()

    async def _deliver(self, job: RunningJob, result: SealedResult, model: ServedModel) -> None:
        """Disk, last frame, SEALED, INGRESS: in this order."""
        blob_hash = result.blob_hash
        head = SpoolHead(
            job_id=result.job_id, epoch=result.epoch, req_hash=result.req_hash.hex(),
            receipt=result.receipt.hex(), blob_hash=blob_hash.hex(),
            response_bytes=len(result.response),
        )  # fmt: skip
        await self._submitter.store(head, result.response)
        offset = 0 if job.rerouted else result.last_frame_offset
        await self._sender.send(
            result.job_id, job.route, offset, result.response[offset:], blob_hash
        )
        header = job.opened.header
        self._enclave.replay.finish(header.job_id, job.opened.slot.enc, blob_hash.hex())
        self._forget(job, model)  # from here on a repeat is answered from the spool or SEALED
        await self._submitter.submit(head, result.response)

    async def _resend(self, dispatch: Dispatch, blob_hash: str) -> None:
        """Send a finished job's bytes again, from the spool or from SEALED."""
        item = self._spool.of_job(dispatch.job_id)
        try:
            if item is not None and item.head.blob_hash == blob_hash:
                response = await asyncio.to_thread(item.read)
            else:
                response = await get_sealed(self._nc, self._provider_id, blob_hash)
        except (OSError, ValueError, CocoonError):
            _log.warning("resend_failed", job_id=dispatch.job_id, epoch=dispatch.route.epoch)
            return
        digest = hashlib.sha256(response).digest()
        await self._sender.send(dispatch.job_id, dispatch.route, 0, response, digest)

    def _count(self, result: SealedResult, duration_s: float) -> None:
        metrics.ANSWERS.inc(result.status.name.lower())
        metrics.JOB_SECONDS.observe(duration_s)
        if result.first_token_s is not None:
            metrics.FIRST_TOKEN_SECONDS.observe(result.first_token_s)
        kinds = ("input", "cached_input", "output", "reasoning")
        for kind, tokens in zip(kinds, result.counts, strict=True):
            if tokens:
                metrics.TOKENS.inc(kind, amount=tokens)
        tell = _log.debug if result.status in (Status.COMPLETE, Status.LENGTH) else _log.info
        tell(
            "job_answered", job_id=result.job_id, epoch=result.epoch,
            outcome=result.status.name.lower(), response_bytes=len(result.response),
            duration_ms=round(duration_s * 1000, 3),
        )  # fmt: skip


def _same_request(req_hash: bytes, dispatch: Dispatch) -> None:
    if req_hash != dispatch.req_hash:
        raise BadRequest("another request runs here under this job id", code="job_id_used")


def _busy(message: str) -> NoReturn:
    raise SealingError(message, code="busy")
