"""`./cocoon provider run`: the agent in the foreground, in words, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import typer

from cocoon.cli.provider_session import Config, config_path, read, running_agent
from cocoon.cli.provider_status import takes_jobs
from cocoon.kernel.errors import CocoonError, ConfigurationError, Conflict, NotFound
from cocoon.kernel.money import format_ton

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cocoon.agent.config import AgentConfig

LOOK_S: Final = 1.0
START_S: Final = 6 * 3600.0  # hashing a large model takes long, and a network may be away
DRAIN_S: Final = 120.0


def run(config: Config = None) -> None:
    """Run the agent here. Ctrl-C lets running jobs end, then stops; twice stops at once."""
    settings = read(config)
    with contextlib.suppress(NotFound):
        agent = running_agent(settings, config)
        raise Conflict(
            f"an agent runs with {settings.agent.data_dir} already (process {agent.pid}); "
            "`./cocoon provider status` shows it"
        )
    raise typer.Exit(asyncio.run(_run(config_path(config).absolute(), settings)))


async def _run(path: Path, config: AgentConfig) -> int:
    from cocoon.devnet.child import Child

    data_dir = config.agent.data_dir
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(
            f"{data_dir} cannot be made ({error.strerror}); name another data_dir in {path}"
        ) from None
    log_file = data_dir / "agent.log"
    child = Child(
        "provider", [sys.executable, "-m", "services.provider"],
        {**os.environ, "COCOON_PROVIDER_CONFIG_FILE": str(path)}, log_file,
    )  # fmt: skip
    _say(f"starting the agent (its log: {log_file})")
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(ending, _on_signal, asked, child.kill)
    telling = asyncio.create_task(_tell(config, path))
    starting = asyncio.create_task(child.start(START_S))
    asking = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait({starting, asking}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()  # a sentence, if it did not start
            ending_task = asyncio.create_task(child.wait())
            await asyncio.wait({ending_task, asking}, return_when=asyncio.FIRST_COMPLETED)
            if ending_task.done():
                return _ended(ending_task.result(), child.last_words())
        _say("draining: running jobs end, no new ones are taken (Ctrl-C again stops at once)")
        await child.stop(DRAIN_S)
        _say("stopped")
        return 0
    finally:
        for task in (telling, starting, asking):
            task.cancel()
        await asyncio.gather(telling, starting, asking, return_exceptions=True)
        await child.stop(DRAIN_S)


def _on_signal(asked: asyncio.Event, kill: Any) -> None:
    if asked.is_set():
        kill()
    asked.set()


def _ended(code: int, last_words: str) -> int:
    if code == 0:
        _say("the agent has ended")
        return 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended (exit code {code})"
    print(
        f"cocoon: the agent {how}; finished answers are kept, `./cocoon provider run` starts it "
        f"again. Its last words:\n{last_words}",
        file=sys.stderr,
    )
    return 1


def _say(text: str) -> None:
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", flush=True)


# ---- what it is doing ----


async def _tell(config: AgentConfig, path: Path) -> None:
    """Say what changed, once a second."""
    before: dict[str, Any] = {}
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            status = await asyncio.to_thread(lambda: running_agent(config, path).status())
        except CocoonError:
            continue
        for line in changes(before, status):
            _say(line)
        before = status


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Sentences for what a person wants to hear of two statuses."""
    was, standing = before.get("standing") or {}, now.get("standing") or {}
    if not before:
        yield f"this is {now['provider_id']}, tier {now.get('tier') or 'none yet'}"
    until = standing.get("evidence_valid_until_ms")
    stood = was.get("attested") and until == was.get("evidence_valid_until_ms")
    if standing.get("attested") and until and not stood:
        when = datetime.fromtimestamp(until / 1000, UTC)
        word = "in the open tier" if now.get("tier") == "open" else "attested"
        yield f"{word} until {when:%H:%M:%S} UTC; it is renewed before"
    if standing.get("revoked") and standing.get("revoked") != was.get("revoked"):
        told = standing["revoked"]
        yield f"DROPPED by the network: {told.get('reason')}; {told.get('message')}"
    if standing.get("last_refusal") and standing["last_refusal"] != was.get("last_refusal"):
        last = standing["last_refusal"]
        yield f"refused: {last.get('code')}; {last.get('message')}"
    old = {model["name"]: model for model in before.get("models") or ()}
    for model in now.get("models") or ():
        takes = takes_jobs(model)
        if model["name"] not in old or takes_jobs(old[model["name"]]) != takes:
            price = format_ton(int((model.get("price") or {}).get("output", 0)))
            yield (
                f"{model['name']} takes jobs, {price} TON per million tokens of the answer"
                if takes
                else f"{model['name']} takes no jobs now: {_why_not(model)}"
            )
    connected = (now.get("bus") or {}).get("connected")
    if before and connected != (before.get("bus") or {}).get("connected"):
        yield (
            "the bus is back" if connected
            else "the bus is away, so no jobs come; finished answers are kept"
        )  # fmt: skip


def _why_not(model: dict[str, Any]) -> str:
    return "its engine does not answer" if model.get("enabled") else "it is disabled in the file"
