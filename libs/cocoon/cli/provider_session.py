"""What a provider's commands share: its one file, its bus connection, the agent on this machine.

They speak on the bus with the provider's own key, and may ask in its own name only.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cocoon.kernel.errors import ConfigurationError, NotFound, Unavailable

if TYPE_CHECKING:
    from cocoon.agent.config import AgentConfig
    from cocoon.bus.client import BusClient

FILE_NAME = "provider.toml"
CONNECT_S = 10.0
T = TypeVar("T")


def default_folder() -> Path:
    """`.cocoon-provider` in the checkout, or in the working folder when installed as a package."""
    return Path(os.environ.get("COCOON_ROOT", ".")) / ".cocoon-provider"


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE",
        help="The provider's file (default: .cocoon-provider/provider.toml in the checkout).",
    ),
]  # fmt: skip


def config_path(given: Path | None) -> Path:
    """The file that is meant; a folder stands for the file in it."""
    path = given if given is not None else default_folder()
    return path / FILE_NAME if path.is_dir() or given is None else path


def read(given: Path | None) -> AgentConfig:
    """Raises ConfigurationError, saying how to make the file."""
    from cocoon.agent.config import read_config

    return read_config(config_path(given))


def config_hint(given: Path | None) -> str:
    """What a command must add to find the same file."""
    return "" if given is None else f" --config {shlex.quote(str(given))}"


@dataclass(frozen=True, slots=True)
class Provider:
    """A connection in the provider's name."""

    nc: BusClient
    provider_id: str

    async def books(self, verb: str, body: Any, timeout_s: float = 10.0) -> dict[str, Any]:
        """Ask billing. Raises the tree's error that it answered, or Unavailable."""
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects

        text = await ask(self.nc, subjects.books(self.provider_id, verb), body, timeout_s)
        return _object(text)

    async def standing(self) -> dict[str, Any]:
        """How attestation sees this provider."""
        from cocoon.bus.requests import ask
        from cocoon.contracts import subjects

        return _object(await ask(self.nc, subjects.attestation(self.provider_id, "standing")))


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise Unavailable("the network answered what is not a JSON object")
    return found


def provider_id_of(config: AgentConfig) -> str:
    """The id that follows from the identity key. Raises ConfigurationError without the key."""
    from cocoon.bus.keys import raw_public, read_seed_file
    from cocoon.kernel.ids import provider_id

    return provider_id(raw_public(read_seed_file(config.agent.seed_file)))


async def connect(config: AgentConfig, timeout_s: float = CONNECT_S) -> Provider:
    """A connection to one of the bus's addresses.

    Raises Unavailable if none answers, ConfigurationError if the network does not know the key.
    """
    from cocoon.bus.connection import connect as connect_bus
    from cocoon.bus.permissions import inbox_prefix

    name = provider_id_of(config)
    try:
        nc = await connect_bus(
            config.network.bus, config.agent.seed_file, "provider-cli", inbox_prefix(name),
            timeout_s=timeout_s, ca_file=config.network.ca_file,
        )  # fmt: skip
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error.message}; `./cocoon provider doctor` says what is missing"
        ) from None
    return Provider(nc, name)


def as_provider(config: AgentConfig, work: Callable[[Provider], Awaitable[T]]) -> T:
    """Run `work` with a connection in the provider's name."""
    from cocoon.bus.connection import close
    from cocoon.telemetry.logs import configure_logs

    configure_logs("cli", "error")

    async def run() -> T:
        provider = await connect(config)
        try:
            return await work(provider)
        finally:
            await close(provider.nc)

    return asyncio.run(run())


# ---- the agent on this machine ----


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """The agent that runs from a data folder, as it told of itself there."""

    pid: int
    observe_url: str
    data_dir: Path

    def status(self) -> dict[str, Any]:
        """GET /status. Raises Unavailable if it does not answer."""
        import httpx

        try:
            answer = httpx.get(f"{self.observe_url}/status", timeout=3, trust_env=False)
            answer.raise_for_status()
            return _object(answer.text)
        except (httpx.HTTPError, ValueError):
            raise Unavailable(f"the agent (process {self.pid}) does not answer") from None

    def post(self, verb: str) -> dict[str, Any]:
        """POST /drain or /reload, with the token that only the agent's user can read."""
        import httpx

        from cocoon.agent.door import TOKEN_NAME, read_token

        headers = {"Authorization": f"Bearer {read_token(self.data_dir)}"}
        try:
            answer = httpx.post(
                f"{self.observe_url}/{verb}", headers=headers, timeout=10, trust_env=False
            )
            if answer.status_code == 401:
                raise Unavailable(
                    f"what answers at {self.observe_url} does not take "
                    f"{self.data_dir / TOKEN_NAME}; has this agent ended?"
                )
            found = _object(answer.text)
        except (httpx.HTTPError, ValueError):
            raise Unavailable(f"the agent (process {self.pid}) does not answer") from None
        if answer.status_code >= 400:
            said = found.get("message") or f"HTTP {answer.status_code}"
            raise Unavailable(f"the agent refused to {verb}: {said}")
        return found

    @property
    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def running_agent(config: AgentConfig, given: Path | None) -> RunningAgent:
    """The agent of this file. Raises NotFound, saying how to start it, if none runs."""
    from cocoon.agent.door import find_door

    data_dir = config.agent.data_dir
    none = NotFound(
        f"no agent runs with {data_dir}; start it with `./cocoon provider run{config_hint(given)}`",
        code="agent_not_running",
    )
    try:
        door = find_door(data_dir)
    except NotFound:
        raise none from None
    agent = RunningAgent(door.pid, door.observe_url, data_dir)
    if not agent.is_alive:
        raise none
    return agent
