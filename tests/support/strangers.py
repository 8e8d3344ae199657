"""Somebody with a key that the network has never heard of, and what he finds there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from nacl.signing import SigningKey

from cocoon.bus import connection, keys, permissions
from cocoon.bus.client import BusClient
from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import EnrolRequest
from cocoon.kernel import ids
from services.attestation.main import serve  # noqa: F401 - what runs here
from services.provider.entering import enter
from tests.support.attestation_world import Network
from tests.support.servers import Bus
from tests.support.spies import Field


@dataclass
class Stranger:
    """Somebody with a key that the network has never heard of."""

    bus: Bus
    seed: bytes = field(default_factory=lambda: keys.new_seed(secrets.token_bytes(32)))
    refused: list[str] = field(default_factory=list)
    opened: list[BusClient] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = ids.provider_id(keys.raw_public(self.seed))
        keys.write_seed_file(self.bus.folder / f"{self.id}.seed", self.seed)

    async def connect(self, **changes: Any) -> BusClient:
        client = await connection.connect(
            self.bus.server.url, self.bus.seed_file(self.id), "stranger",
            permissions.inbox_prefix(self.id), **changes,
        )  # fmt: skip
        log_error = client._error_cb

        async def error_cb(error: Exception) -> None:
            self.refused.append(str(error).lower())
            await log_error(error)

        client._error_cb = error_cb
        self.bus.opened.append(client)
        return client

    async def entered(self) -> BusClient:
        client = await self.connect()
        await enter(client, self.id, EnrolRequest(identity_key=keys.raw_public(self.seed).hex()))
        return client

    async def enrol(self, client: BusClient) -> dict[str, Any]:
        request = EnrolRequest(identity_key=keys.raw_public(self.seed).hex())
        told: dict[str, Any] = json.loads(
            await ask(client, subjects.attestation(self.id, "enrol"), request)
        )
        return told

    async def may_not(self, client: BusClient, *said: str, hear: bool = False) -> set[str]:
        """Which of these the server refuses."""
        self.refused.clear()
        for subject in said:
            if hear:
                await client.subscribe(subject)
            else:
                await client.publish(subject, b"{}")
        await client.flush()
        told = " ".join(self.refused)
        return {subject for subject in said if f'"{subject.lower()}"' in told}


async def row(network: Network, provider: str) -> Any:
    import asyncpg

    conn = await asyncpg.connect(network.database.admin_dsn)
    try:
        return await conn.fetchrow(
            "SELECT * FROM attestation.berths WHERE provider_id = $1", provider
        )
    finally:
        await conn.close()


async def run_sql(network: Network, sql: str, *arguments: Any) -> None:
    import asyncpg

    conn = await asyncpg.connect(network.database.admin_dsn)
    try:
        await conn.execute(sql, *arguments)
    finally:
        await conn.close()


@contextlib.asynccontextmanager
async def watching(bus: Bus) -> AsyncIterator[Field]:
    made = Field(bus)
    try:
        yield made
    finally:
        await made.close()


async def until(wanted: Any, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not wanted():  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.01)


async def connected(
    bus: Bus, login: dict[str, Any], key: SigningKey, nonce: str = "", host: str = "127.0.0.1",
    then: bytes = b"",
) -> bytes:  # fmt: skip
    """What the server says to a CONNECT of our own making, its nonce signed (or another one)."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", bus.server.port, local_addr=(host, 0)
    )
    info = json.loads((await reader.readline()).removeprefix(b"INFO "))
    signature = key.sign((nonce or info["nonce"]).encode()).signature
    sent = {"verbose": False, "pedantic": False, "lang": "x", "version": "1",
            "sig": base64.urlsafe_b64encode(signature).rstrip(b"=").decode(), **login}  # fmt: skip
    writer.write(b"CONNECT %s\r\n%bPING\r\n" % (json.dumps(sent).encode(), then))
    try:
        async with asyncio.timeout(5):
            return await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
