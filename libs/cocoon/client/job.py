"""One request on its way: sent, continued, sealed again where that costs nothing, opened, checked.

It becomes another job only where the log says that the one before ended unpaid, or never was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final

from cocoon.chat import AnyRequest
from cocoon.client.answers import Settlement, StreamShaper, enclave_error, whole_body
from cocoon.client.checks import check_answer, check_provider, check_token_prices
from cocoon.client.choice import Addressee
from cocoon.client.counting import Counters, Meter
from cocoon.client.exchange import Exchange
from cocoon.client.gateway import Gateway
from cocoon.kernel.errors import CocoonError, Conflict, DeadlineExceeded, NotFound, Unavailable
from cocoon.sealing import Data, ErrorRecord, Finished, SealedRequest, Usage

# why a job is sealed again: the gateway asks for it, once the log was asked, too
RESEAL: Final = "reseal"
EXPIRED: Final = "expired"  # its not_after passed before it ran; no enclave runs it any more
PRICE_ROSE: Final = "no_provider_price"  # since the listing that max_price was taken from
# or its last status in the log
PROVIDER_FAILED: Final = "failed"
LINE_BROKE: Final = "cancelled"
CANCELLED: Final = "job_cancelled"
# before the same envelope goes out again, for a job that the gateway disowns and the log does not
STANDS_DELAYS_S: Final = (0.1, 0.5, 1.0)
_STANDS: Final = "stands"


@dataclass(frozen=True, slots=True)
class Began:
    """Somebody answers. Nothing is proven before `Ended`."""

    job_id: str
    provider_id: str
    model_id: str
    max_cost_nanoton: int
    assurance: str  # of the provider whose key seals this answer, as verified here


@dataclass(frozen=True, slots=True)
class Chunk:
    """One OpenAI chunk (JSON bytes) of a stream, authentic and in order."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """The checked end. `body` is the whole answer where it was not streamed."""

    settlement: Settlement
    body: bytes | None = field(default=None, repr=False)


Piece = Began | Chunk | Ended


@dataclass(frozen=True, slots=True)
class Sealing:
    """One sealed form of a request: a reseal makes another, with another job id."""

    sealed: SealedRequest
    by_key_id: dict[bytes, Addressee]
    idempotency_key: str  # the gateway's
    deadline_ms: int  # for the request, however often it is sealed
    again: tuple[str, ...] = ()  # why it was sealed again
    headers: Mapping[str, str] = field(default_factory=dict)  # what the gateway hears beside it
    most_nanoton_per_mtok: tuple[int | None, int | None] = (None, None)  # the caller's: in, out

    @property
    def max_price_nanoton(self) -> int:
        return self.sealed.secrets.header.max_price_nanoton


class Job:
    """One request, sealed. `run` may be called again after a failure: it stays the same job."""

    def __init__(
        self, gateway: Gateway, request: AnyRequest, sealing: Sealing, *, api_key: str,
        traceparent: str, seal_again: Callable[[Sealing, str], Awaitable[Sealing]],
        line_broke: bool = False, counters: Counters | None = None,
    ) -> None:  # fmt: skip
        self._gateway = gateway
        self._request = request
        self._sealing = sealing
        self._api_key = api_key
        self._traceparent = traceparent
        self._seal_again = seal_again
        self._counters = counters or Counters()
        self._line_broke = line_broke  # an earlier line of this job; a restart breaks it, too

    @property
    def job_id(self) -> str:
        """32 hex digits; another one after it was sealed again."""
        return self._sealing.sealed.secrets.header.job_id.hex()

    @property
    def stream(self) -> bool:
        return bool(self._request.stream)

    def abandon(self) -> None:
        """Nobody waits for it any more: tell the gateway, so that it stops at once."""
        self._gateway.cancel_job(self.job_id, self._api_key)

    async def run(self) -> AsyncGenerator[Piece, None]:
        """Send, open and check; seal again once for each cause.

        Yields Began (again for another job), chunks of a stream, then Ended. Raises the tree's
        errors; after content of a stream came they end it without its last chunk. Closing the
        generator closes the line, and after a moment the job is cancelled.
        """
        async with aclosing(self.bursts()) as bursts:
            async for pieces in bursts:
                for piece in pieces:
                    yield piece

    async def bursts(self) -> AsyncGenerator[list[Piece], None]:
        """What `run` yields and raises, together what came together: cheaper in a fast stream."""
        causes: set[str] = set()
        delays_s = iter(STANDS_DELAYS_S)
        while True:
            shown = False
            try:
                async with aclosing(self._attempt()) as bursts:
                    async for pieces in bursts:
                        shown = shown or not isinstance(pieces[-1], Began)
                        yield pieces
                return
            except (Conflict, Unavailable, DeadlineExceeded) as error:
                if isinstance(error, Unavailable):  # the gateway gave it up, and may cancel it
                    self._line_broke = True
                cause = None if shown else await self._cause(error)
                if cause == RESEAL and cause in causes:
                    raise _try_again("The providers' keys change at the moment") from None
                if cause is None or cause in causes:
                    raise
            if cause == _STANDS:
                await self._wait(delays_s)
                continue
            causes.add(cause)
            self._sealing = await self._seal_again(self._sealing, cause)
            self._line_broke = False

    async def _cause(self, error: CocoonError) -> str | None:
        """Why this request may be sealed again as another job, `_STANDS` to send it again as it
        is, or None.

        Nobody is believed but the log: it must say that the job ended without a price or, where
        the gateway asks to seal again, does not know it. Cancelled a job may be by a broken line,
        not by its owner. Raises Unavailable when a reseal is asked for and the log cannot be read.
        """
        told = error.code if error.code in (RESEAL, EXPIRED, PRICE_ROSE) else None
        lost = isinstance(error, Unavailable) or (error.code == CANCELLED and self._line_broke)
        if told is None and not lost:
            return None
        try:
            job = await self._gateway.job(self.job_id, self._api_key)
        except NotFound:
            return told
        except CocoonError:
            if told is None:
                return None
            raise _try_again(f"What became of job {self.job_id} cannot be read") from None
        status = str(job.get("status"))
        either = told is not None or self._line_broke
        unpaid = (PROVIDER_FAILED, LINE_BROKE) if either else (PROVIDER_FAILED,)
        if status in unpaid and job.get("price_nanoton") is None:
            return told or status
        return None if told is None else _STANDS

    async def _wait(self, delays_s: Iterator[float]) -> None:
        """Before the job is attached to once more. Raises Unavailable after the last time."""
        delay_s = next(delays_s, None)
        if delay_s is None:
            raise _try_again(
                f"The gateway asks for job {self.job_id} to be sealed again and its log says that "
                "it may be paid; nothing else was sent"
            )
        await asyncio.sleep(delay_s)

    async def _attempt(self) -> AsyncGenerator[list[Piece], None]:
        sealing = self._sealing
        exchange = Exchange(
            self._gateway, sealing.sealed, sealing.by_key_id, api_key=self._api_key,
            idempotency_key=sealing.idempotency_key, traceparent=self._traceparent,
            headers=sealing.headers,
        )  # fmt: skip
        shaper = StreamShaper(include_usage=self._request.include_usage)
        content, meter = bytearray(), self._counters.meter(self._request)
        usage: bytes | None = None
        failed: bytes | None = None
        began = False
        try:
            async with aclosing(exchange.events()) as arriving:
                async for events in arriving:
                    pieces: list[Piece] = []
                    if not began:
                        began = True
                        match = exchange.match
                        answering = sealing.by_key_id[exchange.key_id]
                        check_provider(answering, match)
                        check_token_prices(match, sealing.most_nanoton_per_mtok)
                        pieces.append(
                            Began(
                                self.job_id, match.provider_id, match.quote.model_id,
                                sealing.max_price_nanoton, answering.assurance.value,
                            )
                        )  # fmt: skip
                    for event in events:
                        if isinstance(event, Data):
                            if not self.stream:
                                content += event.content
                                continue
                            meter.take(event.content)
                            if (shown := shaper.take(event.content)) is not None:
                                pieces.append(Chunk(shown))
                        elif isinstance(event, Usage):
                            usage = event.content
                        elif isinstance(event, ErrorRecord):
                            failed = event.content
                    if pieces:
                        yield pieces
                    if isinstance(finished := events[-1], Finished):
                        settlement = _settle(finished, exchange, sealing, usage)
                        error = enclave_error(settlement.receipt, failed)
                        if error is not None:
                            raise error
                        if not self.stream:
                            meter.take(bytes(content))
                        settlement = self._metered(settlement, meter)
                        if not self.stream:
                            yield [Ended(settlement, whole_body(bytes(content), settlement))]
                        else:
                            last = shaper.finish(settlement, usage)
                            yield [*map(Chunk, last), Ended(settlement)]
        finally:
            self._line_broke = self._line_broke or exchange.line_broke

    def _metered(self, settlement: Settlement, meter: Meter) -> Settlement:
        """Dispute by itself what the receipt claims and the client does not count."""
        dispute = meter.dispute(settlement.receipt, settlement.receipt_raw)
        if dispute is None:
            return settlement
        self._gateway.open_dispute(settlement.job_id, dispute, self._api_key)
        return replace(settlement, dispute=dispute)


def _try_again(why: str) -> Unavailable:
    return Unavailable(f"{why}; try again.", code=RESEAL, retry_after_s=1)


def _settle(
    finished: Finished, exchange: Exchange, sealing: Sealing, usage: bytes | None
) -> Settlement:
    addressee = check_answer(
        finished.receipt, exchange.match, header=sealing.sealed.secrets.header,
        by_key_id=sealing.by_key_id, usage=usage,
    )  # fmt: skip
    return Settlement(
        job_id=exchange.job_id,
        provider_id=addressee.provider_id,
        model_id=finished.receipt.model_id.hex(),
        assurance=addressee.assurance.value,
        receipt=finished.receipt,
        receipt_raw=finished.raw,
    )
