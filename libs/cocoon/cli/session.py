"""What operators' commands share: the running network's folder and an operator's bus connection.

Commands import what they need when they run: a command that only prints should not wait for it.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cocoon.kernel.errors import ConfigurationError

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.devnet.folder import DataFolder, RunningNetwork


def _named(text: str) -> Path:
    """Raises ConfigurationError for an empty name: to a path it is the current folder."""
    if not text.strip():
        raise ConfigurationError("--data is empty; name a folder, or leave it out for .cocoon")
    return Path(text)


Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", parser=_named, help="The network's folder (default: .cocoon)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
T = TypeVar("T")


def folder_of(data: Path | None) -> DataFolder:
    from cocoon.devnet.folder import DataFolder, default_root

    return DataFolder(data or default_root())


def data_hint(folder: DataFolder) -> str:
    """What a command must add to find this folder."""
    from cocoon.devnet.folder import default_root

    usual = folder.root == default_root().resolve()
    return "" if usual else f" --data {shlex.quote(str(folder.root))}"


def _check_not_killed(folder: DataFolder) -> None:
    """Raises ConfigurationError naming what a killed network has left running."""
    if folder.is_running() or not folder.processes.exists():
        return
    from cocoon.devnet.leftovers import still_running

    left = [f"{name} (pid {pid})" for name, pid in still_running(folder).items()]
    if left:
        raise ConfigurationError(
            f"the last network here was killed; {' and '.join(left)} still "
            f"run{'s' if len(left) == 1 else ''}: ./cocoon up{data_hint(folder)} ends "
            f"{'it' if len(left) == 1 else 'them'}"
        )


def as_operator(
    data: Path | None, work: Callable[[Client, RunningNetwork, DataFolder], Awaitable[T]]
) -> T:
    """Run `work` with an operator's connection. Raises ConfigurationError if nothing runs there."""
    folder = folder_of(data)
    _check_not_killed(folder)
    running = folder.read_running()

    from cocoon.bus.connection import close, connect
    from cocoon.bus.permissions import inbox_prefix
    from cocoon.telemetry.logs import configure_logs

    configure_logs("cli", "error")

    async def run() -> T:
        nc = await connect(
            running.nats_url, folder.seed("operator"), "cli", inbox_prefix("operator")
        )
        try:
            return await work(nc, running, folder)
        finally:
            await close(nc)

    return asyncio.run(run())
