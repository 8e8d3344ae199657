"""A network in which every way between two processes goes through a fault proxy of the test's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.chaos_world import ChaosWorld
from tests.support.fault_proxy import FaultProxy, Line, Target, lines
from tests.support.faulty_network import FaultyNetwork

Link = tuple[str, str]  # who, and which server he reaches by it
LINKS: tuple[Link, ...] = (
    ("gateway", "nats"), ("gateway", "postgres"),
    ("matcher", "nats"), ("matcher", "postgres"),
    ("billing", "nats"), ("billing", "postgres"),
    ("attestation", "nats"), ("attestation", "postgres"),
    ("provider-1", "nats"), ("sidecar", "gateway"),
)  # fmt: skip


@dataclass
class LinedWorld(ChaosWorld):
    """A network under trial with its lines."""

    network: FaultyNetwork
    lines: dict[Link, Line] = field(default_factory=dict)

    def heal(self) -> None:
        for line in self.lines.values():
            line.tell(FaultProxy.heal)


@contextmanager
def lined_world(folder: Path, *options: str) -> Iterator[LinedWorld]:
    """Two providers, one of which has a line."""
    network = FaultyNetwork(folder / "network", ("--providers", "2", *options))

    def target(server: str) -> Target:
        return lambda: ("127.0.0.1", network.server_port(server))

    with lines(*(target(server) for _, server in LINKS)) as found:
        by_link = dict(zip(LINKS, found, strict=True))
        links: dict[str, dict[str, int]] = {}
        for (who, server), line in by_link.items():
            links.setdefault(who, {})[server] = line.port
        network.links = links
        with network:
            yield LinedWorld(network, lines=by_link)
