"""A whole network whose processes a test can kill at named points, cut off, or give a wrong clock.

What it puts in the services' way is in `faulty_up` and `named_points`.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.faulty_up import LINKS, SERVERS
from tests.support.named_points import SELF
from tests.support.network import LiveNetwork


@dataclass
class FaultyNetwork(LiveNetwork):
    """A network under `faulty_up`. `links`: see there; they are fixed before it starts."""

    links: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def control(self) -> Path:
        return self.data.with_name(self.data.name + ".control")

    def start(self, *more: str) -> None:
        self.control.mkdir(mode=0o700, exist_ok=True)
        (self.control / LINKS).write_text(json.dumps(self.links))
        super().start(*more)

    def command(self, verb: str, *arguments: str) -> list[str]:
        plain = super().command(verb, *arguments)
        if verb != "up":
            return plain
        return [sys.executable, "-m", "tests.support.faulty_up", str(self.control), *plain[3:]]

    def server_port(self, name: str) -> int:
        """The own port of "nats", "postgres" or "gateway"."""
        ports: dict[str, int] = json.loads((self.control / SERVERS).read_text())
        return ports[name]

    def arm(self, name: str, at: str, victim: str = SELF, on: int = 1) -> None:
        """The process `name` kills itself, or a server, at its `on`-th passage of a point."""
        self._file("fired", name).unlink(missing_ok=True)
        kill = SELF if victim == SELF else str(self.pid(victim))
        plan = {"at": at, "kill": kill, "on": on, "id": secrets.token_hex(4)}
        fresh = self._file("new", name)
        fresh.write_text(json.dumps(plan))
        fresh.rename(self._file("armed", name))

    def fired_s(self, name: str) -> float | None:
        """How many seconds ago it happened; None: not yet."""
        try:
            return max(0.0, time.time() - self._file("fired", name).stat().st_ctime)
        except FileNotFoundError:
            return None

    def disarm(self, name: str) -> None:
        self._file("armed", name).unlink(missing_ok=True)

    def set_clock(self, name: str, wrong_by_ms: int) -> None:
        """Let a provider's wall clock be wrong from now on; 0 mends it."""
        fresh = self._file("new-clock", name)
        fresh.write_text(str(wrong_by_ms))
        fresh.rename(self._file("clock", name))

    def _file(self, kind: str, name: str) -> Path:
        return self.control / f"{kind}-{name}"
