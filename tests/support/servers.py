"""The real servers for tests: one Postgres a session with a fresh database per test, one
nats-server per test. Their folders lie outside pytest's, which takes away passage for others."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
from nacl.signing import SigningKey

from cocoon.bus import accounts, connection, keys, permissions, streams
from cocoon.bus.client import BusClient
from cocoon.bus.permissions import Permissions
from cocoon.devnet.nats_server import NatsServer, NatsUser, nats_users_for_devnet
from cocoon.devnet.postgres import PostgresServer
from cocoon.eventlog.migrate import apply_schema, set_role_passwords
from cocoon.kernel import ids

SHARDS = (0, 1, 2)
DB_ROLES = (
    "cocoon_matcher", "cocoon_billing", "cocoon_attestation", "cocoon_gateway", "cocoon_reader",
)  # fmt: skip
BERTHS = 8  # that attestation may give away; the bus's own two providers live in two more
_TEMPLATE = "cocoon_template"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Database:
    """One database with the whole schema. `admin_dsn` is the superuser's."""

    server: PostgresServer = field(repr=False)
    name: str
    passwords: dict[str, str] = field(repr=False)

    @property
    def admin_dsn(self) -> str:
        return self.server.dsn(self.name)

    def dsn(self, role: str) -> str:
        """Connection string of a service's login, for example "cocoon_billing"."""
        return self.server.dsn(self.name, role, self.passwords[role])


@dataclass
class Bus:
    """A nats-server with the streams declared, and connections that the fixture closes."""

    server: NatsServer
    folder: Path
    providers: tuple[str, ...]
    gateways: tuple[str, ...]
    opened: list[BusClient] = field(default_factory=list)

    def seed_file(self, name: str) -> Path:
        return self.folder / f"{self.id_of(name)}.seed"

    @property
    def issuer_file(self) -> Path:
        """The seed whose word lets strangers in."""
        return self.folder / "issuer.seed"

    def berth_of(self, provider: str) -> str:
        """The account where one of `providers` lives."""
        return accounts.berth(BERTHS + 1 + self.providers.index(provider))

    def id_of(self, name: str) -> str:
        """What an identity is called on the bus: "gateway" is the first of `gateways`."""
        return self.gateways[0] if name == "gateway" else name

    async def connect(self, name: str) -> BusClient:
        """Connect as a role ("billing"), one of `gateways` or one of `providers`."""
        client = await connection.connect(
            self.server.url, self.seed_file(name), name, permissions.inbox_prefix(self.id_of(name))
        )
        self.opened.append(client)
        return client

    async def close(self) -> None:
        for client in self.opened:
            await connection.close(client)
        self.opened.clear()


def scratch(prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"cocoon-{prefix}-"))


async def _admin(server: PostgresServer, *statements: str) -> None:
    conn = await asyncpg.connect(server.dsn(), timeout=10)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


def prepare_template(server: PostgresServer) -> dict[str, str]:
    """Make the template database and the roles' passwords."""
    passwords = {role: secrets.token_hex(16) for role in DB_ROLES}

    async def prepare() -> None:
        await _admin(server, f"CREATE DATABASE {_TEMPLATE}")
        await apply_schema(server.dsn(_TEMPLATE), SHARDS)
        await set_role_passwords(server.dsn(), passwords)

    asyncio.run(prepare())
    return passwords


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[tuple[PostgresServer, dict[str, str]]]:
    folder = scratch("pg")
    server = PostgresServer(folder)
    try:
        server.start()
        yield server, prepare_template(server)
    finally:
        server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def database(
    postgres_server: tuple[PostgresServer, dict[str, str]],
) -> AsyncIterator[Database]:
    """A fresh database with the schema, dropped afterwards."""
    server, passwords = postgres_server
    name = f"t{next(_numbers)}"
    await _admin(server, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    try:
        yield Database(server, name, passwords)
    finally:
        await _admin(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def own_postgres() -> AsyncIterator[Database]:
    """A Postgres of the test's own, to be killed at will."""
    folder = scratch("pgown")
    server = PostgresServer(folder)
    try:
        server.start()
        passwords = await asyncio.to_thread(prepare_template, server)
        yield Database(server, _TEMPLATE, passwords)
    finally:
        server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    """A fresh nats-server with every role, two gateways, two providers, the streams of `SHARDS`.

    The two providers are users of its file, with the permissions that attestation would give them;
    so is a spy in each account, `spy-<account>`, who may hear everything.
    """
    folder = scratch("nats")

    def seeds(names: Iterable[str]) -> dict[str, bytes]:
        return {name: keys.new_seed(secrets.token_bytes(32)) for name in names}

    roles, pair = seeds(permissions.ROLES), ("1", "2")
    gateways = {ids.gateway_id(keys.raw_public(seed)): seed for seed in seeds(pair).values()}
    providers = {ids.provider_id(keys.raw_public(seed)): seed for seed in seeds(pair).values()}
    own = accounts.berths(BERTHS + len(providers))[BERTHS:]
    watched = (*accounts.NAMED, *own)
    spies = seeds(f"spy-{account}" for account in watched)
    issuer = secrets.token_bytes(32)
    named = {**roles, **gateways, **providers, **spies, "issuer": keys.new_issuer_seed(issuer)}
    for name, seed in named.items():
        keys.write_seed_file(folder / f"{name}.seed", seed)
    users = nats_users_for_devnet(
        {name: keys.public_nkey(seed) for name, seed in roles.items()},
        [keys.public_nkey(seed) for seed in gateways.values()],
        SHARDS,
    )
    for account, (name, seed) in zip(own, providers.items(), strict=True):
        allowed = permissions.provider(name, account)
        users.append(NatsUser(keys.public_nkey(seed), allowed))
    for account, seed in zip(watched, spies.values(), strict=True):
        users.append(NatsUser(keys.public_nkey(seed), Permissions((), (">",), account)))
    server = NatsServer(
        folder / "server", users=users, berths=BERTHS + len(own),
        issuer=keys.nkey(keys.ACCOUNT, bytes(SigningKey(issuer).verify_key)),
    )  # fmt: skip
    running = Bus(server, folder, tuple(providers), tuple(gateways))
    try:
        server.start()
        await streams.declare_streams(await running.connect("infra"), SHARDS)
        yield running
    finally:
        await running.close()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
