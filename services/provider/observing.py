"""`GET /status`: how this agent is, for the person who runs it. Counts and ids, never content."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from cocoon.agent.config import ModelConfig
from cocoon.agent.door import AgentDoor, close_door, open_door
from cocoon.bus.service import Stop
from cocoon.kernel.clock import Clock, Randomness
from cocoon.telemetry.observe import Extra, serve_observe
from services.provider.gpus import find_gpus
from services.provider.models import ServedModel
from services.provider.parts import Agent
from services.provider.reloading import Reloader

if TYPE_CHECKING:
    from nats.aio.client import Client

RELOAD_ANSWER_S: Final = 4.0  # the door closes a connection after 5 s


@dataclass
class Status:
    """What is looked at when somebody asks."""

    agent: Agent
    reloader: Reloader
    clock: Clock
    gpus: list[dict[str, Any]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        agent = self.agent
        standing = agent.announcer.standing
        return {
            "provider_id": agent.name,
            "tier": standing.tier,
            "standing": standing.told(self.clock.now_ms()),
            "models": self._models(),
            "running": agent.jobs.running,
            "draining": agent.jobs.draining,
            "spooled": len(agent.spool),
            "bus": {"connected": bool(agent.nc.is_connected), "url": _place(agent.nc)},
            "gpus": self.gpus,
            "gpus_found": f"{len(self.gpus)} found" if self.gpus else "none found",
            "last_reload": self.reloader.last,
        }

    def _models(self) -> list[dict[str, Any]]:
        served = [_served(model) for model in self.agent.models.all]
        names = {model["name"] for model in served}
        disabled = (one for one in self.reloader.config.models if not one.enabled)
        return served + [_disabled(one) for one in disabled if one.name not in names]


def _served(model: ServedModel) -> dict[str, Any]:
    config, engine, tally = model.config, model.engine, model.tally
    return {
        "name": config.name,
        "model_id": model.model_id,
        "enabled": model.wanted,
        "warm": engine.up,
        "healthy": not model.health.away,
        "running": engine.running,
        "waiting": engine.waiting,
        "concurrency": config.concurrency,
        "price": config.price.model_dump(),
        "jobs": tally.jobs,
        "input_tokens": tally.input_tokens,
        "output_tokens": tally.output_tokens,
        "tokens_per_s": round(tally.tokens_per_s(), 3),
    }


def _disabled(config: ModelConfig) -> dict[str, Any]:
    """Its files were not looked at: nobody knows its id."""
    return {
        "name": config.name,
        "model_id": None,
        "enabled": False,
        "warm": False,
        "healthy": False,
        "running": 0,
        "waiting": 0,
        "concurrency": config.concurrency,
        "price": config.price.model_dump(),
        "jobs": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "tokens_per_s": 0.0,
    }


def _place(nc: Client) -> str:
    """Scheme, host and port of the bus; a user in its address is not told."""
    url = nc.connected_url
    if url is None:
        return ""
    parts = urlsplit(url.geturl())
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}"


async def observe(
    host: str, port: int, agent: Agent, reloader: Reloader, stop: Stop,
    stack: contextlib.AsyncExitStack, clock: Clock, randomness: Randomness,
) -> int:  # fmt: skip
    """Serve /metrics, /healthz, /status and the two actions; tell commands where. The port."""
    status = Status(agent, reloader, clock, await find_gpus())
    data_dir = reloader.config.agent.data_dir
    token = randomness.token(32).hex()

    async def drain() -> tuple[int, Mapping[str, Any]]:
        agent.jobs.draining = True
        stop()
        return 202, {"draining": True, "running": agent.jobs.running}

    bound, closer = await serve_observe(
        host, port,
        lambda: {
            "bus": agent.nc.is_connected,
            "announced": agent.announcer.ready(),
            "taking_jobs": agent.jobs.taking_jobs,
        },
        extra=Extra(
            {"/status": status.told},
            {"/drain": drain, "/reload": partial(reloader.wait, RELOAD_ANSWER_S)},
            token,
        ),
    )  # fmt: skip
    stack.push_async_callback(closer)
    named = f"[{host}]" if ":" in host else host
    door = AgentDoor(os.getpid(), f"http://{named}:{bound}", clock.now_ms())
    await asyncio.to_thread(open_door, data_dir, door, token)
    stack.callback(close_door, data_dir, door.pid)
    return bound
