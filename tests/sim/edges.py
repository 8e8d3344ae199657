"""Where the services touch the machine, and what stands there in a simulation.

The table is all that is replaced: Postgres' functions, JetStream's calls, clocks, the enclave's
engine. Everything between these edges is the services' own code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

from cocoon.contracts import envelope
from cocoon.eventlog import append, relay, tail
from cocoon.telemetry import logs
from services.billing import handlers as billing_handlers
from services.billing import results
from services.gateway import handlers as gateway_handlers
from services.gateway import jobs as gateway_jobs
from services.gateway import run as gateway_run
from services.provider import jobs as provider_jobs
from services.provider import submitting
from tests.sim import database, jetstream
from tests.sim.loop import SimLoop
from tests.sim.providers import SimRun

# What a service logs of an exception that it did not expect; everything else stays unsaid.
_BROKEN = frozenset({"job_broke", "dispatch_broke", "task_died", "engine_failed"})
_DECODED = 16_384


def _unsaid(*_: object, **__: object) -> None:
    """What a relay says of its rewinds."""


async def _no_stream(nc: Any, shard: int, first_seq: int, replicas: int = 1) -> None:
    raise NotImplementedError("the model's streams are always declared")


async def _read_sealed(nc: Any, provider: str, digest: str, size: int) -> Any:
    yield await jetstream.get_sealed(nc, provider, digest)


def _edges(loop: SimLoop) -> list[tuple[Any, str, Any]]:
    def now_ms() -> int:
        return int(loop.now_s * 1000)

    def emit(_logger: object, _level: str, event: str, fields: dict[str, Any]) -> None:
        error = fields.get("exc_info")
        if event in _BROKEN:
            loop.errors.append(f"{event}: {error!r}")

    numbers = iter(range(1, 2**62))
    counted = SimpleNamespace(token_hex=lambda size: f"{next(numbers):0{2 * size}x}")
    of_log = (
        "acquire_term", "append_once", "commands_there", "connect", "read_batch", "renew_term",
        "transaction_status",
    )  # fmt: skip
    of_tail = ("connect", "checkpoint", "hash_at", "head", "read_batch")
    of_relay = ("connect", "first_position_since", "hash_at", "head", "read_batch")
    return [
        *((append, name, getattr(database, name)) for name in of_log),
        *((tail, name, getattr(database, name)) for name in of_tail),
        *((relay, name, getattr(database, name)) for name in of_relay),
        (tail, "_Live", jetstream.Live),
        (relay, "api", jetstream.api),
        (relay, "create_events_stream", _no_stream),
        (relay, "secrets", counted),
        (billing_handlers, "time", SimpleNamespace(monotonic=loop.time, perf_counter=loop.time)),
        (results, "acquired", database.acquired),
        (results, "stream_events", database.stream_events),
        (gateway_jobs, "acquired", database.acquired),
        (gateway_jobs, "stream_events", database.stream_events),
        (gateway_run, "now_ms", now_ms),
        (gateway_run, "put_sealed", jetstream.put_sealed),
        (gateway_handlers, "now_ms", now_ms),
        (gateway_handlers, "read_sealed", _read_sealed),
        (provider_jobs, "get_sealed", jetstream.get_sealed),
        (provider_jobs, "JobRun", SimRun),
        (submitting, "put_sealed", jetstream.put_sealed),
        (submitting, "publish_durable", jetstream.publish_durable),
        # a pure function of its bytes, which many read: decoded once
        (envelope, "decode_event", lru_cache(_DECODED)(envelope.decode_event)),
        (logs.Logger, "_emit", emit),
        (relay, "_log", SimpleNamespace(info=_unsaid, error=_unsaid)),
    ]


@contextmanager
def simulated(loop: SimLoop) -> Iterator[None]:
    """Put the models in their places."""
    patches = [mock.patch.object(where, name, new) for where, name, new in _edges(loop)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def wall_s() -> float:
    """The machine's own clock, for the speed that is printed and nothing else."""
    return time.perf_counter()
