"""Results to the network, again and again until it acknowledges them: SEALED first, then INGRESS.

Billing treats a repeat as a repeat, so sending twice is harmless and losing one is not possible.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nacl.signing import SigningKey

from cocoon.bus.publish import publish_durable
from cocoon.bus.sealed import put_sealed
from cocoon.contracts import messages, subjects
from cocoon.contracts.messages import ResultAck, SubmitResult, submission_bytes
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import CocoonError
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.metrics import SPOOL_ITEMS
from cocoon.telemetry.tracing import inject
from services.provider.journal import SpoolHead
from services.provider.spool import Spool, SpoolItem

if TYPE_CHECKING:
    from nats.js import JetStreamContext

_log = get_logger("cocoon.provider.submitting")
SWEEP_S: Final = 0.25
FLUSH_LOOK_S: Final = 0.05
PARALLEL: Final = 8
LONGEST_BACKOFF_S: Final = 60.0


@dataclass(slots=True)
class _Attempt:
    item: SpoolItem
    first_s: float
    due_s: float
    tries: int = 0


class Submitter:
    """Owns the spool's items from the moment they are written."""

    def __init__(
        self, js: JetStreamContext, spool: Spool, identity: SigningKey, provider_id: str,
        clock: Clock, *, first_backoff_s: float,
    ) -> None:  # fmt: skip
        self._js = js
        self._spool = spool
        self._identity = identity
        self._provider_id = provider_id
        self._clock = clock
        self._first_backoff_s = first_backoff_s
        self._waiting: dict[tuple[str, int], _Attempt] = {}
        spool.on_stored = lambda item: self._wait_for(item, delay_s=first_backoff_s)

    def adopt(self) -> None:
        """Take over what a former process left; it is due at once."""
        for item in self._spool:
            self._wait_for(item, delay_s=0.0)

    async def store(self, head: SpoolHead, response: bytes) -> SpoolItem | None:
        """Write a result to disk. None if the disk refuses: then `submit` tries only once."""
        try:
            return await self._spool.write(head, response)
        except OSError as error:
            _log.error("spool_failed", job_id=head.job_id, exc_info=error)
            return None

    async def submit(self, head: SpoolHead, response: bytes) -> bool:
        """One attempt. Returns whether INGRESS has it.

        A SEALED that takes nothing costs late readers their copy; it must not cost the payment.
        """
        try:
            await put_sealed(self._js, self._provider_id, response)
        except CocoonError as error:
            _log.warning("response_not_kept", job_id=head.job_id, epoch=head.epoch, code=error.code)
        try:
            traceparent = inject()  # the job's, on the first attempt
            await publish_durable(
                self._js, subjects.submit_result(self._provider_id), self._message(head),
                {messages.H_TRACEPARENT: traceparent} if traceparent else None,
                stream=subjects.INGRESS_STREAM,
            )  # fmt: skip
        except CocoonError as error:
            _log.warning("submit_failed", job_id=head.job_id, epoch=head.epoch, code=error.code)
            return False
        return True

    def acknowledge(self, ack: ResultAck) -> None:
        """The network has decided: forget the ciphertext."""
        attempt = self._waiting.pop((ack.job_id, ack.epoch), None)
        if attempt is None:
            return
        self._spool.remove(attempt.item)
        SPOOL_ITEMS.set(len(self._spool))
        if ack.outcome == "result_rejected":
            _log.warning("result_rejected", job_id=ack.job_id, epoch=ack.epoch, reason=ack.reason)

    def unsettled(self, younger_than_s: float) -> list[tuple[str, int]]:
        """Results that wait for a decision, and whose leases are worth keeping alive."""
        since_s = self._clock.monotonic_s() - younger_than_s
        return [key for key, attempt in self._waiting.items() if attempt.first_s >= since_s]

    async def flush(self, timeout_s: float) -> int:
        """Try all once more now, and wait for the network's word. Returns how many still wait.

        Those stay on disk, for the next start.
        """
        now_s = self._clock.monotonic_s()
        for attempt in self._waiting.values():
            attempt.due_s = min(attempt.due_s, now_s)
        ends_s = now_s + timeout_s
        while self._waiting and self._clock.monotonic_s() < ends_s:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(FLUSH_LOOK_S)
        return len(self._waiting)

    async def run(self) -> None:
        """Repeat what was not acknowledged, with a doubling pause, until cancelled.

        What was acknowledged leaves the disk here, however long a repetition takes.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tidy())
            tasks.create_task(self._repeat())

    async def _tidy(self) -> None:
        while True:
            try:
                await self._spool.tidy(self._clock.monotonic_s())
            except OSError as error:
                _log.error("spool_failed", exc_info=error)
            await asyncio.sleep(SWEEP_S)

    async def _repeat(self) -> None:
        while True:
            now_s = self._clock.monotonic_s()
            due = [attempt for attempt in self._waiting.values() if attempt.due_s <= now_s]
            for at in range(0, len(due), PARALLEL):
                await asyncio.gather(*map(self._again, due[at : at + PARALLEL]))
            await asyncio.sleep(SWEEP_S)

    async def _again(self, attempt: _Attempt) -> None:
        head = attempt.item.head
        if self._waiting.get(head.name) is not attempt:
            return  # acknowledged while others were submitted
        pause_s = min(self._first_backoff_s * 2 ** min(attempt.tries, 16), LONGEST_BACKOFF_S)
        attempt.tries += 1
        attempt.due_s = self._clock.monotonic_s() + pause_s
        try:
            response = await asyncio.to_thread(attempt.item.read)
        except (OSError, ValueError) as error:
            if self._waiting.get(head.name) is not attempt:
                return  # acknowledged while it was read
            _log.error("spool_damaged", job_id=head.job_id, exc_info=error)
            return
        await self.submit(head, response)

    def _wait_for(self, item: SpoolItem, *, delay_s: float) -> None:
        now_s = self._clock.monotonic_s()
        self._waiting[item.key] = _Attempt(item, now_s, now_s + delay_s)
        SPOOL_ITEMS.set(len(self._spool))

    def _message(self, head: SpoolHead) -> bytes:
        signed = submission_bytes(
            self._provider_id, head.job_id, head.epoch, head.receipt, head.blob_hash
        )
        return SubmitResult(
            provider_id=self._provider_id, job_id=head.job_id, epoch=head.epoch,
            receipt=head.receipt, blob_hash=head.blob_hash, response_bytes=head.response_bytes,
            signature=self._identity.sign(signed).signature.hex(),
        ).to_canonical()  # fmt: skip
