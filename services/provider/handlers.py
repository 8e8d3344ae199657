"""The bus's door: run_job, cancel_job and acknowledgements. One task a dispatch, bounded."""

from __future__ import annotations

import asyncio
import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import nats.errors
from pydantic import ValidationError

from cocoon.contracts import subjects
from cocoon.contracts.messages import CancelJob, DispatchReply, ResultAck
from cocoon.telemetry.logs import get_logger
from services.provider.frames import FrameSender
from services.provider.jobs import Jobs, route_of
from services.provider.submitting import Submitter

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_log = get_logger("cocoon.provider.handlers")
MAX_DISPATCHES: Final = 1024  # being opened at once; more are answered busy at once


class Handlers:
    """Subscribes on `start`, hears nothing after `stop`."""

    def __init__(self, nc: Client, provider_id: str, jobs: Jobs, submitter: Submitter) -> None:
        self._nc = nc
        self._provider_id = provider_id
        self._sender = FrameSender(nc, provider_id)
        self._jobs = jobs
        self._submitter = submitter
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen_to_acks(self) -> None:
        """Hear what became of submitted results."""
        subject = subjects.acks(self._provider_id)
        self._subscriptions.append(await self._nc.subscribe(subject, cb=self.on_ack))

    async def listen_to_jobs(self) -> None:
        """Take jobs from now on."""
        for subject, handler in (
            (subjects.cancel_job(self._provider_id), self.on_cancel_job),
            (subjects.run_job(self._provider_id), self.on_run_job),
        ):
            self._subscriptions.append(await self._nc.subscribe(subject, cb=handler))

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def on_run_job(self, message: Msg) -> None:
        if len(self._tasks) >= MAX_DISPATCHES:
            await self._answer(message, DispatchReply(accepted=False, code="busy"))
            return
        task = asyncio.create_task(self._do_run_job(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do_run_job(self, message: Msg) -> None:
        try:
            reply = await self._jobs.dispatch(message.headers or {}, message.data)
        except Exception as error:  # noqa: BLE001 - an answer goes out whatever broke
            _log.error("dispatch_broke", exc_info=error)
            reply = DispatchReply(accepted=False, code="busy")
        await self._answer(message, reply)

    async def _answer(self, message: Msg, reply: DispatchReply) -> None:
        try:
            job_id, route = route_of(message.headers or {})
        except ValueError:
            return  # it does not say whom to tell
        await self._sender.answer(job_id, route, _encoded(reply))

    async def on_cancel_job(self, message: Msg) -> None:
        try:
            cancel = CancelJob.model_validate_json(message.data)
        except ValidationError:
            return
        self._jobs.cancel(cancel.job_id, cancel.epoch)

    async def on_ack(self, message: Msg) -> None:
        try:
            ack = ResultAck.model_validate_json(message.data)
        except ValidationError:
            return
        self._submitter.acknowledge(ack)


@lru_cache(maxsize=16)
def _encoded(reply: DispatchReply) -> bytes:
    return reply.to_canonical()
