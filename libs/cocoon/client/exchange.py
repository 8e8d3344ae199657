"""One sealed request's way to its whole sealed response, over lines that may break.

Sends the same envelope again while nothing came, continues from the byte where a line broke, a
bounded number of times. Never makes a second job.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Final

from cocoon.client.checks import Match, read_match
from cocoon.client.choice import Addressee
from cocoon.client.gateway import Gateway, unreachable
from cocoon.client.lines import Broken, Line, LineError, Silent, Unreached
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    Conflict,
    DeadlineExceeded,
    EvidenceRejected,
    NotFound,
    SealingError,
    Transient,
    Unavailable,
)
from cocoon.sealing import Event, Finished, ResponseOpener, SealedRequest

RESUME_DELAYS_S: Final = (0.1, 0.3, 0.6, 1.0, 2.0)
UNREACHED_TRIES: Final = 3  # a gateway that restarts is away for a second
# the gateway's answers to a resume that will not change: the job ended, or has no more bytes
NO_MORE_CODES: Final = frozenset({"job_failed", "job_cancelled", "range_not_satisfiable"})
DRAIN_S: Final = 1.0
BODY_READ_TIMEOUT_S: Final = 600.0  # a whole body is made before its first byte comes
STREAM_READ_TIMEOUT_S: Final = 120.0


class Exchange:
    """Sends one sealed request and yields what opens, the checked receipt last."""

    def __init__(
        self, gateway: Gateway, sealed: SealedRequest, by_key_id: Mapping[bytes, Addressee], *,
        api_key: str, idempotency_key: str, traceparent: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._gateway = gateway
        self._sealed = sealed
        self._attested = {key: item.signing_key for key, item in by_key_id.items()}
        self._api_key = api_key
        self._idempotency_key = idempotency_key
        self._traceparent = traceparent
        self._headers = headers
        header = sealed.secrets.header
        self.job_id = header.job_id.hex()
        self._model_id = header.model_id.hex()
        self._timeout_s = STREAM_READ_TIMEOUT_S if header.stream else BODY_READ_TIMEOUT_S
        self._opener: ResponseOpener | None = None
        self._match: Match | None = None
        self.line_broke = False  # while the gateway may have had the request

    @property
    def match(self) -> Match:
        """Who answers, as the gateway says. There once the first event came."""
        if self._match is None:
            raise Unavailable("Nothing has answered yet.")
        return self._match

    @property
    def key_id(self) -> bytes:
        """Whose key the answer is sealed with: proven by the first event that opened."""
        prefix = None if self._opener is None else self._opener.prefix
        if prefix is None:
            raise Unavailable("Nothing has answered yet.")
        return prefix.key_id

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """Yield content as it opens: together what came together, and never nothing.

        Raises EvidenceRejected for an answer that must not be believed, Unavailable(truncated) with
        what was charged, and the gateway's errors.
        """
        for attempt in range(len(RESUME_DELAYS_S) + 1):
            if attempt:
                await asyncio.sleep(RESUME_DELAYS_S[attempt - 1])
            resumed = self._received() > 0
            line: Line | None = None
            try:
                line = await self._connect()
                opener = self._opened(line)
                skip = self._received() if resumed and line.status == 200 else 0
                while chunk := await line.next():
                    fresh, skip = chunk[skip:], max(skip - len(chunk), 0)
                    events = opener.feed(fresh)
                    if events:
                        yield events
                        if isinstance(events[-1], Finished):
                            await _drain(line)
                            return
            except Silent:
                raise await self._silent() from None
            except Unreached as error:
                if not resumed and attempt >= UNREACHED_TRIES:
                    raise unreachable(self._gateway.base_url, error) from None
            except Broken:
                self.line_broke = True
            except (BadRequest, NotFound, Conflict, Transient) as error:
                if not resumed:
                    raise
                if error.code in NO_MORE_CODES:
                    break
            except SealingError as error:
                raise await self._refused(error) from None
            finally:
                if line is not None:
                    line.close()
        raise await self._truncated()

    async def _connect(self) -> Line:
        received = self._received()
        if received:
            return await self._gateway.stored_response(
                self.job_id, received, api_key=self._api_key, read_timeout_s=self._timeout_s
            )
        return await self._gateway.post_job(
            self._sealed.envelope, api_key=self._api_key, traceparent=self._traceparent,
            idempotency_key=self._idempotency_key, read_timeout_s=self._timeout_s,
            headers=self._headers,
        )  # fmt: skip

    def _received(self) -> int:
        return 0 if self._opener is None else self._opener.received_bytes

    def _opened(self, line: Line) -> ResponseOpener:
        """The opener that continues, or a new one for the match that this answer names."""
        if self._opener is None or not self._opener.received_bytes:
            self._match = read_match(line.headers, job_id=self.job_id, model_id=self._model_id)
            self._opener = ResponseOpener(
                self._sealed.secrets, self._attested, quote_id=self._match.quote_id,
                epoch=self._match.epoch,
            )  # fmt: skip
        return self._opener

    async def _truncated(self) -> CocoonError:
        return Unavailable(
            "The answer broke off before its receipt and could not be continued. "
            + await self.charged(),
            code="truncated",
        )

    async def _silent(self) -> CocoonError:
        return DeadlineExceeded(
            f"The gateway said nothing for {self._timeout_s:.0f} s. " + await self.charged()
        )

    async def _refused(self, error: SealingError) -> CocoonError:
        return EvidenceRejected(
            f"The answer was refused: {error.message} " + await self.charged(), code=error.code
        )

    async def charged(self) -> str:
        """A sentence about what the log says was charged for this job."""
        try:
            job = await self._gateway.job(self.job_id, self._api_key)
        except CocoonError:
            return f"What was charged is not known yet; ask for job {self.job_id} later."
        price, status = job.get("price_nanoton"), str(job.get("status", "unknown"))[:32]
        if price is None:
            return f"Nothing was charged so far (job {self.job_id} is {status})."
        return f"{str(price)[:20]} nanoTON were charged (job {self.job_id} is {status})."


async def _drain(line: Line) -> None:
    """Let the connection end by itself, so that it can be used again. Content is complete."""
    if line.ended:
        return
    with suppress(LineError, TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while await line.next():
                pass
