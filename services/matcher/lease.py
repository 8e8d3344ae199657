"""A lease as the matcher remembers it, and where a gateway hears of its job."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from cocoon.contracts.events import ProviderMatched
from cocoon.contracts.messages import MatchUpdate

CONFLICT_PAUSE_S = 0.02  # billing was first: its event is on the way through the tail


class News(Protocol):
    """Where a gateway hears of its job. Losing a message costs the gateway a timeout, no more."""

    async def __call__(
        self, gateway_id: str, job_id: str, update: MatchUpdate, traceparent: str
    ) -> None: ...


@dataclass(slots=True)
class Lease:
    match: ProviderMatched
    gateway_id: str
    traceparent: str
    deadline_s: float  # monotonic, renewed by heartbeats
    matched_at_s: float
    renewed_at_s: float  # when a heartbeat last named the job
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    began: bool = False
    cancelled_at_s: float | None = None
    ending: bool = False
    turned_away: bool = False  # its provider is busy: the job waits for room there or elsewhere
    waits_since_s: float | None = None  # since when busy providers have kept the job waiting
