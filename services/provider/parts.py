"""The parts of a running agent, and how they end together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoon.bus.service import Stop
from cocoon.telemetry.logs import get_logger
from services.provider.announcing import Announcer
from services.provider.handlers import Handlers
from services.provider.heartbeat import Heart
from services.provider.jobs import Jobs
from services.provider.spool import Spool
from services.provider.submitting import Submitter
from services.provider.table import ModelTable

if TYPE_CHECKING:
    from nats.aio.client import Client

_log = get_logger("cocoon.provider.parts")


@dataclass
class Agent:
    """The parts that live as long as the process."""

    name: str
    nc: Client
    models: ModelTable
    jobs: Jobs
    spool: Spool
    submitter: Submitter
    handlers: Handlers
    heart: Heart
    announcer: Announcer

    def changed(self) -> None:
        """The models are others, or run otherwise."""
        self.announcer.changed()
        self.heart.changed()

    def crowded(self) -> None:
        """One of several models is full, or is not any more."""
        if len(self.models.wanted) > 1:
            self.heart.changed()


async def end(agent: Agent, stop: Stop, *, drain_s: float, flush_s: float) -> None:
    """Take nothing new, finish what runs, hand the results in; at a second signal at once."""
    work = asyncio.create_task(_drain(agent, drain_s, flush_s))
    hurried = asyncio.create_task(stop.wait_again())
    try:
        await asyncio.wait({work, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _log.warning("drain_cut_short", count=agent.jobs.running)
            work.cancel()
            await agent.jobs.end()
        await asyncio.gather(work, return_exceptions=True)
    finally:
        hurried.cancel()


async def _drain(agent: Agent, drain_s: float, flush_s: float) -> None:
    agent.jobs.draining = True
    await agent.heart.beat()  # the matcher stops sending at once
    await agent.jobs.drain(drain_s)
    if agent.nc.is_connected:
        left = await agent.submitter.flush(flush_s)
        _log.info("drained", count=left)
