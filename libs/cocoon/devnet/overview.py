"""What a running network says about itself, in one look: for `cocoon status`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import DirectoryRequest
from cocoon.devnet.accounts import balance
from cocoon.devnet.folder import DataFolder, RunningNetwork
from cocoon.eventlog.connection import connect
from cocoon.eventlog.honesty import standings
from cocoon.kernel.errors import CocoonError

if TYPE_CHECKING:
    from nats.aio.client import Client

TIMEOUT_S = 2.0


async def collect(nc: Client, running: RunningNetwork, folder: DataFolder) -> dict[str, Any]:
    """Ask every service, the streams, the directory and the books; what is away is left out."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        urls = {
            **running.observe_urls,
            "sidecar": running.sidecar_url.removesuffix("/v1"),
            "nats": running.nats_monitor_url,
        }
        states = await asyncio.gather(*(_healthy(http, url) for url in urls.values()))
        services = dict(zip(urls, states, strict=True))
        processes = folder.read_processes()
        for server in ("postgres", "triton"):
            if server in processes or server == "postgres":
                services[server] = _lives(processes.get(server))
        streams = await _streams(http, running)
    return {
        "network_id": running.network_id,
        "gateway": running.gateway_url,
        "sidecar": running.sidecar_url,
        "services": services,
        "streams": streams,
        "providers": await _providers(nc),
        "account": await _account(nc, running),
        "parked": await _parked(nc, running),
        "honesty": await _honesty(running, folder),
    }


async def _healthy(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(f"{url}/healthz")).status_code == 200
    except httpx.HTTPError:
        return False


def _lives(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def _streams(http: httpx.AsyncClient, running: RunningNetwork) -> dict[str, int]:
    try:
        answer = await http.get(f"{running.nats_monitor_url}/jsz?streams=1")
        accounts = answer.json()["account_details"]
    except (httpx.HTTPError, KeyError, ValueError):
        return {}
    heads = {
        int(item["name"].removeprefix("EVENTS_")): int(item["state"]["last_seq"])
        for account in accounts
        for item in account.get("stream_detail", ())
        if item["name"].startswith("EVENTS_")
    }
    return {str(shard): heads[shard] for shard in sorted(heads)}


async def _providers(nc: Client) -> list[dict[str, Any]]:
    try:
        answer = json.loads(await ask(nc, subjects.DIRECTORY_REQUEST, DirectoryRequest()))
    except CocoonError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for entry in answer["providers"]:
        row = found.setdefault(
            entry["provider_id"],
            {
                "provider_id": entry["provider_id"], "tier": entry["tier"],
                "region": entry.get("region"), "models": [], "quantisations": {},
                **entry["load"],
            },
        )  # fmt: skip
        name = entry["offer"]["name"]
        row["models"].append(name)
        row["quantisations"][name] = entry.get("quantisation")
    return list(found.values())


async def _parked(nc: Client, running: RunningNetwork) -> list[dict[str, Any]]:
    """The streams that billing could not post, on every account shard."""
    found: list[dict[str, Any]] = []
    for shard in running.shards[1:]:
        try:
            answer = json.loads(await ask(nc, subjects.billing(shard, "parked")))
        except CocoonError:
            continue
        found += [{"shard": shard, **row} for row in answer["streams"]]
    return found


async def _honesty(running: RunningNetwork, folder: DataFolder) -> dict[str, Any]:
    """What canaries found and clients dispute, by provider."""
    try:
        dsn = folder.dsn("reader").read_text(encoding="utf-8").strip()
        conn = await connect(dsn, "cocoon-status")
        try:
            found = await standings(conn, running.shards[1:])
        finally:
            await conn.close(timeout=TIMEOUT_S)
    except (CocoonError, OSError):
        return {}
    return {
        name: {"dishonest": bool(one.state.dishonest), "canaries": sum(one.outcomes.values()),
               "differed": one.outcomes["differed"], "disputes": sum(one.disputes.values())}
        for name, one in found.items()
    }  # fmt: skip


async def _account(nc: Client, running: RunningNetwork) -> dict[str, str]:
    try:
        return await balance(nc, running.account_id, running.shards[1:])
    except CocoonError:
        return {}
