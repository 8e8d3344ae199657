"""Composition of the gateway: settings -> resources -> run. No decision is made here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cocoon.bus.connection import broker, close, connect
from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.contracts import subjects
from cocoon.eventlog.connection import create_pool
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.ids import GatewayId
from cocoon.kernel.ids import gateway_id as gateway_id_of
from cocoon.telemetry.observe import serve_observe
from services.gateway.directory import Directory
from services.gateway.handlers import Gateway
from services.gateway.keys import KeyRing, answer
from services.gateway.manifests import Manifests
from services.gateway.routes import Routes
from services.gateway.server import serve_http
from services.gateway.settings import GatewaySettings
from services.gateway.store import follow_changes

if TYPE_CHECKING:
    from faststream.nats import NatsBroker, NatsMessage


def main() -> None:
    run("gateway", GatewaySettings, serve)


async def serve(settings: GatewaySettings, stop: Stop) -> None:
    """Open the door until stopped; then take nobody new and finish what runs."""
    # uvicorn reports every body that is cut on purpose; real failures are caught and logged by us.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    dsn = settings.postgres_dsn_file.read_text(encoding="utf-8").strip()
    gateway_id = _own_id(settings.nats_seed_file)
    prefix = inbox_prefix(gateway_id)
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, settings.nats_seed_file, "gateway", prefix, stop)
        stack.push_async_callback(close, nc)
        pool = await create_pool(dsn, "cocoon-gateway", size=8)
        stack.push_async_callback(pool.close)
        gateway = Gateway(settings, gateway_id, nc, nc.jetstream(), pool, clock)
        await gateway.switchboard.listen(nc)
        # Its own connections: neither busy reads nor a flood of unknown keys waits for the other.
        key_pool = await create_pool(dsn, "cocoon-gateway-lookups", size=settings.key_connections)
        stack.push_async_callback(key_pool.close)
        keys = KeyRing(pool, key_pool, clock, settings.key_ttl_s)
        stack.push_async_callback(keys.close)
        changes = stop.watch(
            asyncio.create_task(follow_changes(dsn, keys.on_change, keys.on_state), name="keys")
        )
        stack.push_async_callback(_cancel, changes)
        listening = broker(settings.nats_url, settings.nats_seed_file, "gateway", prefix, stop)
        _answer_operators(listening, keys)
        await listening.start()
        stack.push_async_callback(listening.stop)
        directory = Directory(nc, clock, settings.directory_ttl_s, settings.rpc_timeout_s)
        stack.push_async_callback(directory.close)
        manifests = Manifests(nc, settings.rpc_timeout_s)
        stack.push_async_callback(manifests.close)
        observe_port, closer = await serve_observe(
            settings.observe_host,
            settings.observe_port,
            lambda: {"bus": nc.is_connected, "keys": keys.hearing},
        )
        stack.push_async_callback(closer)
        routes = Routes(gateway, keys, directory, manifests, clock)
        port = await stack.enter_async_context(serve_http(routes, settings))
        announce_ready("gateway", port=port, observe_port=observe_port, gateway_id=gateway_id)
        await stop.wait()
        gateway.admission.draining = True


def _own_id(seed_file: Path | None) -> GatewayId:
    """The id that the bus binds to the seed; any, on a bus without users."""
    if seed_file is None:
        return GatewayId(f"gw{secrets.token_hex(6)}")
    return gateway_id_of(raw_public(read_seed_file(seed_file)))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _answer_operators(listening: NatsBroker, keys: KeyRing) -> None:
    """rpc.gateway.keys.{create,list,revoke}: one of the gateways answers."""
    doers = {
        "create": keys.do_create_key, "list": keys.do_list_keys, "revoke": keys.do_revoke_key,
    }  # fmt: skip

    @listening.subscriber(subjects.gateway_keys("*"), queue="gateway", no_reply=True)
    async def on_request(message: NatsMessage) -> None:
        raw = message.raw_message
        do = doers.get(raw.subject.rpartition(".")[2])
        if do is None or not raw.reply:
            return
        reply = await answer(do, raw.data)
        await raw.respond(reply.to_canonical())
