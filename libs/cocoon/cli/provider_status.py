"""`./cocoon provider status`, `drain` and `reload`: the agent on this machine, live."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cocoon.cli.provider_session import Config, Provider, RunningAgent, connect, read, running_agent
from cocoon.cli.session import Json
from cocoon.kernel.errors import BadRequest, CocoonError, Unavailable
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from cocoon.agent.config import AgentConfig

EVERY_S: Final = 1.0
MONEY_EVERY_S: Final = 10.0
DRAIN_WITHIN_S: Final = 3600.0
_CLEAR = "\x1b[H\x1b[2J"


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show the agent's jobs, tokens a second, queue and today's earnings."""
    if watch and as_json:
        raise BadRequest("give --watch or --json, not both")
    settings = read(config)
    agent = running_agent(settings, config)
    from cocoon.telemetry.logs import configure_logs

    configure_logs("cli", "error")
    asyncio.run(_show(settings, agent, watch=watch, as_json=as_json))


async def _show(config: AgentConfig, agent: RunningAgent, *, watch: bool, as_json: bool) -> None:
    from cocoon.bus.connection import close

    provider: Provider | None = None
    money: dict[str, Any] = {"unavailable": "the bus does not answer"}
    asked_s = float("-inf")
    try:
        while True:
            found = await asyncio.to_thread(agent.status)
            if time.monotonic() - asked_s >= MONEY_EVERY_S:
                provider, money = await _money(config, provider)
                asked_s = time.monotonic()
            if as_json:
                print(json.dumps({**found, "earnings": money}))
                return
            text = "\n".join(lines(found, money))
            sys.stdout.write(f"{_CLEAR}{text}\n" if watch and sys.stdout.isatty() else f"{text}\n")
            sys.stdout.flush()
            if not watch:
                return
            await asyncio.sleep(EVERY_S)
    finally:
        if provider is not None:
            await close(provider.nc)


async def _money(
    config: AgentConfig, provider: Provider | None
) -> tuple[Provider | None, dict[str, Any]]:
    """Today's earnings, or why they are not known; the agent's own state is shown without them."""
    from cocoon.contracts.books import EarningsRequest

    try:
        provider = provider or await connect(config, timeout_s=3.0)
        found = await provider.books("earnings", EarningsRequest(by="day", limit=1))
    except CocoonError as error:
        return provider, {"unavailable": error.message}
    kept = ("balance_nanoton", "today", "in_transit", "refused_results")
    return provider, {name: found[name] for name in kept}


def lines(found: dict[str, Any], money: dict[str, Any]) -> list[str]:
    """The status for a person."""
    standing = found.get("standing") or {}
    bus = found.get("bus") or {}
    shown = [
        f"{found['provider_id']}   tier {found.get('tier') or 'none yet'}   {_doing(found)}",
        f"  bus       connected  {bus.get('url') or ''}"
        if bus.get("connected")
        else "  bus       AWAY: it is tried again; `./cocoon provider doctor` says more",
        f"  evidence  {_left(standing)}",
    ]
    if standing.get("revoked"):
        shown.append(f"  DROPPED   {standing['revoked'].get('reason')}; `./cocoon provider why`")
    if standing.get("last_refusal"):
        last = standing["last_refusal"]
        shown.append(f"  refused   {last.get('code')}: {last.get('message')}")
    if "unavailable" in money:
        shown.append(f"  earnings  not known now: {money['unavailable']}")
    else:
        today = money["today"]
        shown += [
            f"  today     {format_ton(int(today['earned_nanoton']))} TON with "
            f"{today['jobs']:,} jobs; {money['in_transit']['jobs']:,} in transit, "
            f"{money['refused_results']:,} refused",
            f"  balance   {format_ton(int(money['balance_nanoton']))} TON",
        ]
    shown += [f"  spooled   {found.get('spooled', 0):,} answers wait for the network", ""]
    shown.append(f"  {'model':28} {'':9} running  waiting      jobs  tokens/s")
    for model in found.get("models") or ():
        state = (
            "disabled" if not model.get("enabled")
            else "ill" if not model.get("healthy")
            else "warm" if model.get("warm") else "cold"
        )  # fmt: skip
        shown.append(
            f"  {model['name'][:28]:28} {state:9} {model['running']:>3} of"
            f" {model['concurrency']:<3} {model['waiting']:>5} {model['jobs']:>10,}"
            f" {float(model['tokens_per_s']):>9.1f}"
        )
    return shown


def _doing(found: dict[str, Any]) -> str:
    if found.get("draining"):
        return "DRAINING"
    if not (found.get("bus") or {}).get("connected"):
        return "NO JOBS: the bus is away"
    if not any(takes_jobs(model) for model in found.get("models") or ()):
        return "NO JOBS: no model can serve"
    return "taking jobs"


def takes_jobs(model: dict[str, Any]) -> bool:
    return bool(model.get("enabled") and model.get("healthy"))


def _left(standing: dict[str, Any]) -> str:
    until = standing.get("evidence_valid_until_ms")
    if not standing.get("attested") or not until:
        return "none stands; clients do not find this provider"
    left_s = max(0, until // 1000 - time.time_ns() // 1_000_000_000)
    return f"holds for {left_s // 60:,} minutes; the agent renews it"


def drain(config: Config = None) -> None:
    """Take no more jobs, and return when the running ones have ended."""
    agent = running_agent(read(config), config)
    agent.post("drain")
    print("no new jobs are taken; waiting for the running ones", flush=True)
    ends_s = time.monotonic() + DRAIN_WITHIN_S
    said = -1
    while agent.is_alive and (left := _still_run(agent)) != 0:
        if time.monotonic() >= ends_s:
            raise Unavailable(
                "the agent has not ended its jobs in time; `./cocoon provider status` shows it"
            )
        if left is not None and left != said:
            print(f"  {left} still run", flush=True)
            said = left
        time.sleep(0.5)
    print("drained")


def _still_run(agent: RunningAgent) -> int | None:
    """None: it does not say, for its door is closed already, or it hangs."""
    try:
        return int(agent.status()["running"])
    except CocoonError:
        return None


def reload(config: Config = None, as_json: Json = False) -> None:
    """Let the agent read its file again: prices and models change, running jobs go on."""
    found = running_agent(read(config), config).post("reload")
    if as_json:
        print(json.dumps(found))
        return
    if found.get("ok") is None:
        print("the reload goes on; `./cocoon provider status --json` shows its end in last_reload")
        return
    print(found["message"])
