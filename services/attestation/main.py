"""Composition of attestation: settings -> resources -> run. No decision is made here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from cocoon.bus.connection import broker, close, connect
from cocoon.bus.keys import raw_issuer_seed, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import create_pool, leadership
from cocoon.eventlog.read import head
from cocoon.eventlog.tail import Tail
from cocoon.evidence.policy import SignedPolicy, parse_policy
from cocoon.evidence.trust import load_trust
from cocoon.kernel.clock import SystemClock, SystemRandomness
from cocoon.kernel.errors import ConfigurationError, Transient
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.observe import serve_observe
from services.attestation import decide
from services.attestation.entry import Entry
from services.attestation.handlers import Attestation
from services.attestation.memory import Memory
from services.attestation.rpc import wire
from services.attestation.settings import AttestationSettings

if TYPE_CHECKING:
    from cocoon.bus.client import BusClient

log = get_logger("services.attestation")
ROLE, ENTRY = "attestation", "entry"


def main() -> None:
    run(ROLE, AttestationSettings, serve)


async def serve(settings: AttestationSettings, stop: Stop) -> None:
    """Check the rules, become the one writer, catch up with shard 0, then answer until stopped."""
    trust = load_trust(settings.trust_file)
    signed = _read_policy(settings.policy_file)
    decide.check_environment(settings.environment, trust, signed)
    dsn = _read_dsn(settings.postgres_dsn_file)
    issuer = SigningKey(raw_issuer_seed(read_seed_file(settings.issuer_seed_file)))
    prefix = inbox_prefix(ROLE)
    async with contextlib.AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, settings.nats_seed_file, ROLE, prefix, stop)
        stack.push_async_callback(close, nc)
        doorkeeper = await connect(
            settings.nats_url, settings.entry_seed_file, ENTRY, inbox_prefix(ENTRY), stop
        )
        stack.push_async_callback(close, doorkeeper)
        if not await _lead(stack, dsn, stop):
            return
        pool = await create_pool(dsn, f"cocoon-{ROLE}")
        stack.callback(pool.terminate)
        appender = LogAppender(dsn, NETWORK_SHARD, ROLE)
        stack.push_async_callback(appender.close)
        await appender.acquire_term()
        memory = Memory(settings.heartbeat_fresh_s, settings.fee_bps)
        clock, randomness, bans = SystemClock(), SystemRandomness(), dict[str, str]()
        entry = Entry(
            settings, pool, doorkeeper, issuer, clock, randomness,
            memory.providers.__contains__, bans.__contains__,
        )  # fmt: skip
        service = Attestation(
            settings, trust, signed, memory, appender, pool, clock, randomness, stop, entry, bans
        )
        stack.callback(service.close)
        async with pool.acquire() as conn:
            goal = (await head(conn, NETWORK_SHARD)).position
        tail = await _follow(dsn, nc, service, goal, stop, stack)
        await service.load()
        await service.publish_policy()
        await entry.load()
        _spawn(stack, stop, _sweep(settings, service), "sweep")
        listening = broker(settings.nats_url, settings.nats_seed_file, ROLE, prefix, stop)
        wire(listening, service)
        await listening.start()
        stack.push_async_callback(listening.stop)
        stack.push_async_callback(entry.close)
        await entry.open()
        port, closer = await serve_observe(
            settings.observe_host,
            settings.observe_port,
            lambda: {
                "bus": nc.is_connected,
                "entry": doorkeeper.is_connected,
                "tail": not tail.done(),
                "leading": not stop.error,
            },
        )
        stack.push_async_callback(closer)
        announce_ready(ROLE, observe_port=port)
        await stop.wait()


async def _lead(stack: contextlib.AsyncExitStack, dsn: str, stop: Stop) -> bool:
    """Wait to be the one active instance, or for the end; whether it leads."""
    leading = asyncio.create_task(
        stack.enter_async_context(leadership(dsn, NETWORK_SHARD, ROLE)), name="lead"
    )
    ending = asyncio.create_task(stop.wait())
    await asyncio.wait({leading, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if leading.done():
        leading.result()
        return True
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    return False


async def _follow(
    dsn: str,
    nc: BusClient,
    service: Attestation,
    goal: int,
    stop: Stop,
    stack: contextlib.AsyncExitStack,
) -> asyncio.Task[None]:
    """Fold shard 0 up to `goal` before anything is decided, then follow it."""
    caught_up = asyncio.Event()
    task = _spawn(stack, stop, _tail(dsn, nc, service, goal, caught_up), "tail-0")
    waiting = asyncio.create_task(caught_up.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    return task


async def _tail(
    dsn: str, nc: BusClient, service: Attestation, goal: int, caught_up: asyncio.Event
) -> None:
    if goal == 0:
        caught_up.set()
    async with Tail(dsn, nc, NETWORK_SHARD, from_position=1) as tail:
        async for batch in tail:
            for stored in batch:
                service.on_network_event(stored)
            if batch[-1].position >= goal:
                caught_up.set()


async def _sweep(settings: AttestationSettings, service: Attestation) -> None:
    while True:
        await asyncio.sleep(settings.sweep_s)
        try:
            await service.sweep()
        except Transient as error:
            log.warning("sweep_failed", code=error.code)


def _spawn(
    stack: contextlib.AsyncExitStack, stop: Stop, work: Coroutine[Any, Any, None], name: str
) -> asyncio.Task[None]:
    task = stop.watch(asyncio.create_task(work, name=name))

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)
    return task


def _read_policy(path: Path) -> SignedPolicy:
    try:
        return parse_policy(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"the policy file {path} cannot be read ({error.strerror}); name the network's policy"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _read_dsn(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(
            f"the file {path} with the DSN cannot be read ({error.strerror})"
        ) from None
