"""`python -m services.provider.doctor`: every requirement of a provider, one JSON line a check.

It is told of the file by COCOON_PROVIDER_CONFIG_FILE, like the agent. Exit 0: nothing fails, 1:
something does. A check that breaks is a failure of that check, and the next one runs.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

from cocoon.agent.config import AgentConfig, read_config
from cocoon.kernel.errors import ConfigurationError
from cocoon.telemetry.logs import configure_logs
from services.provider import doctor_logging as logging
from services.provider import doctor_machine as machine
from services.provider import doctor_models as models
from services.provider import doctor_network as network
from services.provider.findings import Finding, fail, ok

CONFIG_FILE, QUICK = "COCOON_PROVIDER_CONFIG_FILE", "COCOON_DOCTOR_QUICK"
Check = Callable[[], Awaitable[list[Finding]]]


async def examine(path: Path, *, quick: bool = False) -> AsyncIterator[Finding]:
    """The findings, each as soon as it is known."""
    try:
        config = await asyncio.to_thread(read_config, path)
    except ConfigurationError as error:
        yield fail(
            "configuration",
            error.message,
            "mend the file, or make one with `./cocoon provider init`",
        )
        return
    yield ok("configuration", f"{path}, {len(config.enabled)} models enabled")
    for name, check in _checks(config, quick=quick):
        for finding in await _safely(name, check):
            yield finding


def _checks(config: AgentConfig, *, quick: bool) -> list[tuple[str, Check]]:
    """What is looked at on this machine, in the order in which a person would mend it."""
    checks: list[tuple[str, Check]] = [
        ("permissions", _of(machine.secret_files, config)),
        ("data folder", _of(machine.data_folder, config.agent.data_dir)),
        ("disk", _of(machine.disk, config.agent.data_dir)),
        ("tee", _of(machine.tee, config)),
        ("gpu", _of(machine.gpu, config)),
    ]
    for model in config.enabled:
        if not quick:
            checks.append((f"files and engine of {model.name}", partial(models.examine, model)))
        checks.append((f"server of {model.name}", partial(logging.request_logging, model)))
        checks.append((f"core dumps of {model.name}", _of(machine.core_dumps, model)))
    checks.append(("trust", _of(network.trust, config)))
    checks.append(("clock", _of(network.clock, config)))
    checks.append(("bus", partial(network.bus, config)))
    checks += [
        (f"price of {model.name}", _of(network.price, config, model)) for model in config.enabled
    ]
    return checks


def _of(check: Callable[..., Finding], *arguments: object) -> Check:
    """A check that reads files or waits for a program: in a thread."""

    async def run() -> list[Finding]:
        return [await asyncio.to_thread(check, *arguments)]

    return run


async def _safely(name: str, check: Check) -> list[Finding]:
    try:
        return await check()
    except Exception as error:  # noqa: BLE001 - the other checks still say what they find
        return [
            fail(name, f"the check itself broke ({type(error).__name__})", "report this, please")
        ]


async def _run(path: Path, *, quick: bool) -> int:
    failed = False
    async for finding in examine(path, quick=quick):
        sys.stdout.write(finding.line() + "\n")
        sys.stdout.flush()
        failed = failed or finding.state == "fail"
    return 1 if failed else 0


def main() -> int:
    configure_logs("doctor", "critical")
    path = os.environ.get(CONFIG_FILE, "")
    if not path:
        sys.stderr.write(f"doctor: set {CONFIG_FILE} to the provider's file\n")
        return 2
    return asyncio.run(_run(Path(path), quick=os.environ.get(QUICK) == "1"))


if __name__ == "__main__":
    sys.exit(main())
