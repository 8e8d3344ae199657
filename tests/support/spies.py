"""Everyone on one bus with what the documents promise him, and spies that hear whole accounts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from cocoon.bus import keys, permissions
from cocoon.bus.accounts import PLATFORM
from cocoon.bus.client import BusClient
from cocoon.contracts import catalogue
from tests.support.servers import Bus

JOB, BLOB = "0f" * 16, "ab" * 32
SERVICES = tuple(permissions.ROLES)


def identities(bus: Bus) -> dict[str, str]:
    """Everyone who has a key -> his role in the table."""
    return {
        **{name: name for name in SERVICES},
        **dict.fromkeys(bus.gateways, "gateway"),
        **dict.fromkeys(bus.providers, "provider"),
    }


def examples(bus: Bus, channel: catalogue.Channel) -> list[tuple[str, str, str]]:
    """(subject, provider in it, gateway in it) for each provider and gateway that it may name."""
    pairs = product(
        bus.providers if "{provider_id}" in channel.address else ("",),
        bus.gateways if "{gateway_id}" in channel.address else ("",),
    )
    known = {
        "shard": "1", "aggregate": "job", "id": JOB, "event_name": "job_requested", "job_id": JOB,
        "epoch": "1", "sha256": BLOB, "index": "0",
    }  # fmt: skip
    return [
        (channel.address.format(provider_id=provider, gateway_id=gateway, **known),
         provider, gateway)
        for provider, gateway in pairs
    ]  # fmt: skip


def may(who: str, role: str, named: tuple[str, ...], provider: str, gateway: str) -> bool:
    """Whether the table gives an end of a channel to `who`: providers and gateways only as
    themselves, where the subject names one of their kind."""
    own = {"provider": provider or who, "gateway": gateway or who}
    return role in named and own.get(role, who) == who


@dataclass
class Table:
    """What the documents promise, for the identities of one bus."""

    publish: set[tuple[str, str]] = field(default_factory=set)
    hear: set[tuple[str, str]] = field(default_factory=set)
    stored: dict[str, str] = field(default_factory=dict)  # subject -> the stream that keeps it
    subjects: list[str] = field(default_factory=list)


def table(bus: Bus) -> Table:
    found = Table()
    for channel in catalogue.CHANNELS:
        for subject, provider, gateway in examples(bus, channel):
            found.subjects.append(subject)
            if channel.stream:
                found.stored[subject] = channel.stream.format(shard=1)
            for who, role in identities(bus).items():
                if may(who, role, channel.publishers, provider, gateway):
                    found.publish.add((who, subject))
                if not channel.stream and may(who, role, channel.hearers, provider, gateway):
                    found.hear.add((who, subject))
    return found


class Unguarded(BusClient):
    """Takes whatever comes, as an attacker's client or a foreign one would."""

    def _is_inbox(self, sid: int) -> bool:
        return True


@dataclass
class Tried:
    """A connection that notes what the server refuses."""

    nc: Client
    violations: list[str]

    async def refused(
        self, *subjects_: str, subscribe: bool = False, body: bytes = b"{}"
    ) -> set[str]:
        """Which of these the server refuses to let it publish (or hear)."""
        self.violations.clear()
        for subject in subjects_:
            if subscribe:
                await self.nc.subscribe(subject)
            else:
                await self.nc.publish(subject, body)
        await self.nc.flush()  # a refusal comes before the server's answer to this
        said = " ".join(self.violations).lower()
        return {subject for subject in subjects_ if f'"{subject.lower()}"' in said}


class Field:
    """A bus with spies, and a plain connection for whoever asks."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.reached: dict[str, list[str]] = {}  # account -> subjects that arrived in it
        self._opened: list[Client] = []

    async def plain(self, name: str) -> Tried:
        """A connection without our client's guard, as an attacker would have."""
        violations: list[str] = []

        async def error_cb(error: Exception) -> None:
            violations.append(str(error))

        nc = Unguarded()
        await nc.connect(
            self.bus.server.url,
            nkeys_seed_str=keys.read_seed_file(self.bus.seed_file(name)).decode(),
            inbox_prefix=permissions.inbox_prefix(self.bus.id_of(name)),
            error_cb=error_cb,
        )
        self._opened.append(nc)
        return Tried(nc, violations)

    async def spy(self, *accounts: str) -> None:
        """Hear everything that reaches these accounts."""
        for account in accounts:
            spy = await self.plain(f"spy-{account}")
            reached: list[str] = []

            async def on_message(message: Msg, reached: list[str] = reached) -> None:
                reached.append(message.subject)

            await spy.nc.subscribe(">", cb=on_message)
            await spy.nc.flush()
            self.reached[account] = reached

    async def settled(self, *speakers: Tried) -> None:
        """Until the spies have heard what the speakers set going."""
        marker = f"mat.{self.bus.gateways[0]}.{JOB}"
        for speaker in speakers:
            await speaker.nc.flush()
        await asyncio.sleep(0.3)  # JetStream answers from tasks of its own
        matcher = await self.plain("matcher")
        before = self.reached[PLATFORM].count(marker)
        await matcher.nc.publish(marker, b"")
        async with asyncio.timeout(5):
            while self.reached[PLATFORM].count(marker) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        for nc in self._opened:
            await nc.close()


def forms(subject: str, body: bytes, target: str) -> list[dict[str, Any]]:
    """One publish per way to have something sent to `target`."""
    return [
        {"subject": subject, "payload": body, "reply": target},
        {"subject": subject, "payload": body, "headers": {"Nats-Trace-Dest": target}},
    ]


@asynccontextmanager
async def answering(field_: Field, who: str, *hear: str) -> AsyncIterator[None]:
    """`who` answers every request on `hear`, wherever the answer is wanted."""
    tried = await field_.plain(who)

    async def answer(message: Msg) -> None:
        if message.reply:
            await tried.nc.publish(message.reply, b'{"ok":true}')

    for subject in hear:
        await tried.nc.subscribe(subject, cb=answer)
    await tried.nc.flush()
    yield
    await tried.nc.flush()


def others(field_: Field, who: str) -> list[str]:
    """Every subject that `who` may not publish, and the inboxes of all the others."""
    promised = table(field_.bus)
    inboxes = [
        f"{permissions.inbox_prefix(name)}.x.y" for name in identities(field_.bus) if name != who
    ]
    return [s for s in promised.subjects if (who, s) not in promised.publish] + inboxes


def reached(field_: Field, accounts: Iterable[str], targets: Iterable[str]) -> list[str]:
    found = set(targets)
    return [
        subject for account in accounts for subject in field_.reached[account] if subject in found
    ]
