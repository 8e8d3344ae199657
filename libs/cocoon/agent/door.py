"""How a command on this machine finds the running agent and shows that it may steer it.

`<data_dir>/agent.json` says where it is, `<data_dir>/control.token` (mode 0600) opens its actions.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from cocoon.kernel.errors import ConfigurationError, NotFound

ADDRESS_NAME: Final = "agent.json"
TOKEN_NAME: Final = "control.token"  # noqa: S105 - a file's name
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class AgentDoor:
    """A running agent: its process, where `/status` is, and since when (Unix ms)."""

    pid: int
    observe_url: str
    started_ms: int


def open_door(data_dir: Path, door: AgentDoor, token: str) -> None:
    """Tell commands of this agent, which is up now."""
    try:
        _write_private(data_dir / TOKEN_NAME, token.encode())
        _write_private(data_dir / ADDRESS_NAME, json.dumps(asdict(door)).encode() + b"\n")
    except OSError as error:
        raise ConfigurationError(
            f"{data_dir} cannot be written ({error.strerror}); make room, or name another data_dir"
        ) from None


def close_door(data_dir: Path, pid: int) -> None:
    """Take it back, unless another process has told of itself since."""
    with contextlib.suppress(NotFound):
        if find_door(data_dir).pid == pid:
            for name in (ADDRESS_NAME, TOKEN_NAME):
                with contextlib.suppress(OSError):
                    (data_dir / name).unlink(missing_ok=True)


def find_door(data_dir: Path) -> AgentDoor:
    """Raises NotFound if no agent has told of itself there (one that was killed still does)."""
    try:
        value = json.loads(_read(data_dir / ADDRESS_NAME))
        door = AgentDoor(int(value["pid"]), str(value["observe_url"]), int(value["started_ms"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise NotFound(
            f"no agent runs with {data_dir}; start one with `./cocoon provider run`",
            code="agent_not_running",
        ) from None
    return door


def read_token(data_dir: Path) -> str:
    """What `POST /drain` and `POST /reload` take as a bearer token. Raises NotFound."""
    try:
        return _read(data_dir / TOKEN_NAME).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise NotFound(
            f"{data_dir / TOKEN_NAME} cannot be read; run this as the agent's own user",
            code="agent_token_missing",
        ) from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _write_private(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    partial.replace(path)
