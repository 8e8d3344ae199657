"""One job from its opened request to its signed receipt: generate, pace, seal, send.

The response never leaves in the clear. Whatever happens inside ends in a receipt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from cocoon.chat import (
    Answer,
    ChatRequest,
    CompletionAnswer,
    EmbeddingRequest,
    TextAnswer,
    TextRequest,
)
from cocoon.chat.embeddings import check_dimensions
from cocoon.contracts.events import Quote
from cocoon.domain.pricing import quote_id
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError, DeadlineExceeded, Unavailable
from cocoon.sealing import OpenedRequest, Pace, Profile, ResponseSealer, Status
from cocoon.telemetry.logs import get_logger
from services.provider.answering import Telling, bill, check_price, read_request
from services.provider.backends.base import Backend, Embedder, Ended, Output, Piece, Started
from services.provider.fitting import check_embeddings_fit
from services.provider.frames import Route

if TYPE_CHECKING:
    from services.provider.enclave import Enclave

Send = Callable[[str, Route, int, bytes, bytes | None], Awaitable[None]]
_log = get_logger("cocoon.provider.running")
IDLE_WAIT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 1.0


class Served(Protocol):
    """The model that a job is for (models.py)."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may call it."""

    @property
    def backend(self) -> Backend | Embedder:
        """Its engine. Generate within `place` only: it may be another after a restart."""

    def place(self) -> AbstractAsyncContextManager[None]:
        """Wait until the engine is up and has a place for this job. Raises as a start does."""


@dataclass(slots=True)
class RunningJob:
    """A job being run. A later lease of the same job may change its route and quote."""

    opened: OpenedRequest
    evidence_id: bytes
    route: Route
    quote: Quote
    opened_ms: int
    traceparent: str = ""
    cancelled: bool = False
    on_cancel: Callable[[], None] | None = None  # set while it runs
    whole: bytearray = field(default_factory=bytearray, repr=False)  # ciphertext sent so far
    rerouted: bool = False

    @property
    def job_id(self) -> str:
        return self.opened.header.job_id.hex()

    def cancel(self) -> None:
        """Stop it, at once or as soon as it begins."""
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()


@dataclass(frozen=True, slots=True)
class SealedResult:
    """A finished job: the whole response, its receipt, and the route of its last frame."""

    job_id: str
    epoch: int
    req_hash: bytes
    response: bytes = field(repr=False)
    receipt: bytes = field(repr=False)
    status: Status
    last_frame_offset: int
    first_token_s: float | None
    counts: tuple[int, int, int, int]

    @property
    def blob_hash(self) -> bytes:
        return hashlib.sha256(self.response).digest()


class JobRun:
    """Runs one job. `run()` returns when the receipt is signed; it raises nothing on purpose."""

    def __init__(
        self, job: RunningJob, enclave: Enclave, served: Served, send: Send, clock: Clock,
        *, job_timeout_s: float, max_bytes: int,
    ) -> None:  # fmt: skip
        self._job = job
        self._enclave = enclave
        self._served = served
        self._send = send
        self._clock = clock
        self._timeout_s = job_timeout_s
        self._max_bytes = max_bytes
        self._sealer = ResponseSealer(job.opened)
        self._streams = job.opened.header.stream
        self._news = asyncio.Event()
        self._unsent = bytearray()
        self._first_ms: int | None = None
        self._first_s: float | None = None
        self._began_s = clock.monotonic_s()
        self._telling = self._teller(None)
        self._headed = False
        self._closing = False  # the engine has said its last word
        self._wake_tokens = 1
        self._engine: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Ask the engine now; `run` seals what it says. A job that is cancelled asks nothing."""
        self._job.on_cancel = self._cancel
        if self._job.cancelled:
            self._cancel()
        else:
            self._engine = asyncio.create_task(self._generate())

    async def run(self) -> SealedResult:
        if self._job.opened.header.profile is Profile.P1:
            self._put(b"")  # its ticks begin at once, whatever the engine does
        try:
            await self._pump()
        finally:
            self._job.on_cancel = None
            if self._engine is not None:
                await self._end(self._engine)
        return self._finish()

    async def _end(self, engine: asyncio.Task[None]) -> None:
        # An engine that has ended is closing its connection: cut off, that would leak it.
        if not engine.done():
            await asyncio.wait({engine}, timeout=CLOSE_TIMEOUT_S if self._closing else 0)
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)

    # ---- the engine's side ----

    async def _generate(self) -> None:
        try:
            check_price(self._job.opened.header, self._job.quote)
            asked = self._served.backend
            request = read_request(
                self._job.opened, model_names=self._served.names,
                capabilities=asked.capabilities, kind=asked.kind,
            )  # fmt: skip
            if not isinstance(request, EmbeddingRequest):
                self._telling = self._teller(self._answer(request))
            async with asyncio.timeout(self._timeout_s), self._served.place():
                backend = self._served.backend  # another than `asked` if it was started anew
                if isinstance(request, EmbeddingRequest):
                    assert isinstance(backend, Embedder)  # noqa: S101 - its kind was checked
                    await self._embed(request, backend)
                else:
                    assert isinstance(backend, Backend)  # noqa: S101 - its kind was checked
                    await self._drain(request, backend)
        except TimeoutError:
            self._fail(DeadlineExceeded("The answer took too long; ask for less."))
        except CocoonError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a receipt must follow, whatever broke
            _log.error("engine_failed", job_id=self._job.job_id, exc_info=error)
            self._fail(Unavailable("The engine failed; send the request again."))

    def _answer(self, request: TextRequest) -> TextAnswer:
        told = self._job.job_id, self._job.opened_ms // 1000
        fingerprint = self._served.backend.system_fingerprint
        if isinstance(request, ChatRequest):
            return Answer(*told, fingerprint, request)
        return CompletionAnswer(*told, fingerprint, request)

    def _teller(self, answer: TextAnswer | None) -> Telling:
        header = self._job.opened.header
        return Telling(self._sealer, answer, profile=header.profile, stream=header.stream)

    async def _embed(self, request: EmbeddingRequest, backend: Embedder) -> None:
        header = self._job.opened.header
        check_dimensions(request, backend.dimensions)
        check_embeddings_fit(request, backend.dimensions, header.profile, self._max_bytes)
        made = await backend.embed(request, max_input_tokens=header.max_input_tokens)
        if self._telling.ended:
            return
        self._closing = True
        self._first()
        self._telling.tell_vectors(request, made)
        self._news.set()

    async def _drain(self, request: TextRequest, backend: Backend) -> None:
        header = self._job.opened.header
        asked = request.max_output_tokens
        limit = header.max_output_tokens if asked is None else min(asked, header.max_output_tokens)
        if limit < 1:
            raise Unavailable("The request leaves no room for an answer.")
        outputs = backend.generate(
            request, max_input_tokens=header.max_input_tokens, max_output_tokens=limit
        )
        try:
            async for output in outputs:
                first = self._first_ms is None and isinstance(output, Piece)
                self._take(output)
                if first:  # seal it and let the bus write it before more is read
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                if self._telling.ended and not isinstance(output, Ended):
                    break  # at its bound: the engine need not go on
        finally:
            await outputs.aclose()
        if not self._telling.ended:
            raise Unavailable("The engine ended without an end.")

    def _take(self, output: Output) -> None:
        telling = self._telling
        if telling.ended:
            return
        match output:
            case Started(prompt_tokens):
                telling.prompt_tokens = prompt_tokens or 0
            case Piece():
                self._first()
                room_bytes = self._max_bytes - len(self._job.whole) - len(self._unsent)
                self._closing = not telling.add(output, room_bytes)
            case Ended():
                self._closing = True
                self._first()
                telling.end(output)
        if telling.ended or self._wake_tokens <= 1 or telling.tokens_waiting >= self._wake_tokens:
            self._news.set()

    def _first(self) -> None:
        if self._first_ms is None:
            self._first_ms = self._clock.now_ms()
            self._first_s = self._clock.monotonic_s() - self._began_s

    def _fail(self, error: CocoonError) -> None:
        if not self._telling.ended:
            self._telling.fail(error)
            self._news.set()

    def _cancel(self) -> None:
        if not self._telling.ended:
            self._telling.cancel()
            if self._engine is not None:
                self._engine.cancel()
            self._news.set()

    # ---- the sealing side ----

    async def _pump(self) -> None:
        pace = Pace(self._job.opened.header.profile, opened_ms=self._monotonic_ms())
        while True:
            self._news.clear()
            telling = self._telling
            step = pace.step(
                self._monotonic_ms(),
                tokens_waiting=telling.tokens_waiting,
                bytes_waiting=telling.bytes_waiting,
                sealed_bytes=len(self._unsent),
                ended=telling.ended,
            )
            self._wake_tokens = step.wake_tokens
            if step.seal:
                self._put(telling.seal_waiting())
            if step.pad:
                self._put(self._sealer.pad())
            if step.finish or (step.seal and telling.ended and not self._streams):
                return  # one body goes out with its receipt: it is shown with it, or never
            await self._send_bytes(step.send_bytes)
            if step.seal and telling.ended and not telling.bytes_waiting:
                continue  # nothing else will wake us
            await self._wait(step.wake_ms)

    def _put(self, sealed: bytes) -> None:
        """Queue sealed bytes. The first ones bring the response's head along: nothing is sent
        before there is something to say, so that a provider that breaks until then costs nothing.
        """
        if not self._headed:
            self._headed = True
            self._unsent += self._sealer.prefix()
        self._unsent += sealed

    async def _wait(self, wake_ms: int | None) -> None:
        wait_s = IDLE_WAIT_S if wake_ms is None else max(0, wake_ms - self._monotonic_ms()) / 1000
        timer = asyncio.get_running_loop().call_later(wait_s, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    async def _send_bytes(self, size: int | None) -> None:
        job = self._job
        data = bytes(self._unsent if size is None else self._unsent[:size])
        if not data:
            return
        del self._unsent[: len(data)]
        offset = len(job.whole)
        job.whole += data
        if job.rerouted:  # a later lease's gateway has seen nothing yet
            job.rerouted = False
            offset, data = 0, bytes(job.whole)
        await self._send(job.job_id, job.route, offset, data, None)

    def _finish(self) -> SealedResult:
        """Sign the receipt and seal the last frame. The caller stores, then sends it."""
        job, telling = self._job, self._telling
        status = Status.FAILED if telling.status is None else telling.status
        usage = telling.usage
        account = bill(status, usage, job.opened.header, job.quote)
        last_ms = max(self._clock.now_ms(), job.opened_ms)
        first_ms = last_ms if self._first_ms is None else min(self._first_ms, last_ms)
        receipt = self._enclave.sign_receipt(
            self._sealer, status=status, epoch=job.route.epoch,
            quote_id=bytes.fromhex(quote_id(job.quote)), evidence_id=job.evidence_id,
            counts=account.counts, price_nanoton=account.price_nanoton,
            times_ms=(job.opened_ms, first_ms, last_ms),
        )  # fmt: skip
        offset = 0 if job.rerouted else len(job.whole)
        self._put(self._sealer.finish(receipt))
        job.whole += bytes(self._unsent)
        return SealedResult(
            job.job_id, job.route.epoch, job.opened.req_hash, bytes(job.whole), receipt, status,
            offset, self._first_s, account.counts,
        )  # fmt: skip

    def _monotonic_ms(self) -> int:
        return int(self._clock.monotonic_s() * 1000)
