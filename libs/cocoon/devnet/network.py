"""The whole network on one machine: its servers and processes, started, watched, stopped.

Everything listens on loopback. A child that dies is started again a few times; whatever cannot be
started is reported in a sentence with the place of its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cocoon.bus.client import BusClient
from cocoon.bus.connection import close, connect
from cocoon.bus.permissions import inbox_prefix, matcher_name
from cocoon.bus.requests import ask
from cocoon.bus.streams import declare_streams
from cocoon.contracts import subjects
from cocoon.contracts.messages import DirectoryRequest
from cocoon.devnet import minilm
from cocoon.devnet.accounts import first_account
from cocoon.devnet.child import Child
from cocoon.devnet.doors import EntryAddress, open_doors
from cocoon.devnet.folder import DataFolder, RunningNetwork
from cocoon.devnet.identity import (
    DATABASE_ROLES,
    database_passwords,
    make_identity,
    open_names,
    provider_names,
)
from cocoon.devnet.nats_server import LOOPBACK, NatsServer
from cocoon.devnet.ports import free_port, free_port_after, is_free
from cocoon.devnet.postgres import PostgresServer
from cocoon.devnet.private_file import write_private
from cocoon.devnet.supervising import Part, Supervisor, in_thread
from cocoon.devnet.tls_door import TlsDoor
from cocoon.devnet.triton_server import CAPABILITIES, CONTEXT_TOKENS, TritonServer
from cocoon.eventlog.migrate import apply_schema, set_role_passwords
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import ConfigurationError, Transient, Unavailable

DATABASE = "postgres"
LISTED_WITHIN_S, LISTED_PAUSE_S = 30.0, 0.1
DEFAULT_GATEWAY_PORT, DEFAULT_SIDECAR_PORT = 8641, 8642


@dataclass(frozen=True, slots=True)
class Options:
    """What `cocoon up` was asked for. A port None: the usual one or the next free one after it.

    key_epoch_s: how often providers change their keys; each lives for three times that, less a
    second: clients do not seal to one that has less than twenty seconds left.
    """

    gateway_port: int | None = None
    sidecar_port: int | None = None
    backend_url: str | None = None
    model_name: str | None = None
    otlp_endpoint: str | None = None
    providers: int = 1
    key_epoch_s: float | None = None
    triton: bool = False
    shards: int | None = None  # of accounts; None: as the folder was made, else one
    concurrency: int | None = None  # jobs that a provider runs at once; None: its own default
    open_providers: int = 0  # beside the others: without a TEE
    embeddings: bool = False  # one provider more, which serves all-MiniLM-L6-v2
    entry: EntryAddress | None = None  # where providers elsewhere come in; None: nowhere


def _port(
    asked: int | None, usual: int, what: str, option: str, other: int | None,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """The port for one of the two doors; `other` is the other door's."""
    if asked is None and usual != other and is_free(usual):
        return usual
    if asked is None:
        port = free_port_after(usual, (other,) if other else ())
        say(f"port {usual} is taken; the {what} listens on {port}")
        return port
    if asked and asked == other:
        raise ConfigurationError(f"port {asked} is the other door's; name another with {option}")
    if asked and not is_free(asked):
        raise ConfigurationError(
            f"port {asked} for the {what} is taken by another program; stop that one, or name "
            f"another with {option} (0 takes any free one)"
        )
    return asked or free_port()


_Process = Child | PostgresServer | NatsServer | TritonServer


class Network:
    """One development network in one folder. `say` gets progress, a line at a time."""

    def __init__(self, folder: DataFolder, options: Options, say: Callable[[str], None]) -> None:
        self._folder, self._options, self._say = folder, options, say
        self._children: dict[str, Child] = {}
        self._postgres = PostgresServer(folder.postgres, follows=True)
        self._nats: NatsServer | None = None
        self._triton = TritonServer(folder.logs / "triton.log") if options.triton else None
        self._gateway_port = _port(
            options.gateway_port, DEFAULT_GATEWAY_PORT, "gateway", "--gateway-port",
            options.sidecar_port or (None if options.gateway_port else DEFAULT_SIDECAR_PORT), say,
        )  # fmt: skip
        self._sidecar_port = _port(
            options.sidecar_port, DEFAULT_SIDECAR_PORT, "sidecar", "--sidecar-port",
            self._gateway_port, say,
        )  # fmt: skip
        self._attested = provider_names(options.providers + options.embeddings)
        self._embedder = self._attested[-1] if options.embeddings else None
        self._open = open_names(options.open_providers)
        self._providers = (*self._attested, *self._open)
        accounts = range(1, folder.account_shards(options.shards) + 1)
        self._shards = (subjects.NETWORK_SHARD, *accounts)
        self._matchers = {matcher_name(shard): shard for shard in accounts}
        self._account_id, self._network_id = "", ""
        self._door: TlsDoor | None = None  # the gateway's, for providers elsewhere

    # ---- start ----

    async def start(self) -> RunningNetwork:
        """Bring everything up. Raises CocoonError with a sentence for a person."""
        identity = await asyncio.to_thread(
            make_identity, self._folder, self._shards, SystemClock(),
            self._attested, self._open,
        )  # fmt: skip
        self._folder.keep_account_shards(len(self._matchers))
        entry = self._options.entry
        former = self._folder.bus_port()
        self._nats = NatsServer(
            self._folder.nats, former if former and is_free(former) else 0,
            users=identity.nats_users, issuer=identity.nats_issuer,
            doors=open_doors(self._folder, entry) if entry else None, follows=True,
        )  # fmt: skip
        if entry is None:
            self._keep_bus_port(former, self._nats.port)
        starts = [self._postgres.start, self._nats.start]
        if self._triton is not None:
            starts.append(self._triton.start)
        self._say(f"starting Postgres{', Triton' if self._triton else ''} and NATS")
        await asyncio.gather(*(asyncio.to_thread(start) for start in starts))
        self._record()  # from here on a killed start leaves something that must be found again
        await asyncio.gather(self._prepare_database(), self._prepare_bus())
        # All at once: each waits for what it needs, and two cores spend the time on imports.
        self._say("starting attestation, billing, matcher, gateway and the provider")
        names = ("attestation", "billing", *self._matchers, "gateway", *self._providers)
        children = [self._service(name) for name in names]
        await asyncio.gather(*(child.start() for child in children))
        self._record()
        await self._open_gateway_door()
        await self._first_account()
        self._say("starting the sidecar")
        await asyncio.gather(self._service("sidecar").start(), self._until_listed())
        self._network_id = identity.network_id
        running = self._running()
        self._folder.write_running(running)
        self._record()
        return running

    async def _open_gateway_door(self) -> None:
        entry, folder = self._options.entry, self._folder
        if entry is not None:
            self._door = TlsDoor(
                entry.listen_host(), entry.gateway_port, self._gateway_port,
                folder.bus_certificate, folder.bus_key,
            )  # fmt: skip
            await self._door.start()

    def _record(self) -> None:
        pids = {name: child.pid for name, child in self._children.items()}
        pids["postgres"] = self._postgres.pid
        pids["nats"] = self._nats.pid if self._nats else None
        if self._triton is not None:
            pids["triton"] = self._triton.pid
        self._folder.write_processes(pids)

    def _keep_bus_port(self, former: int, port: int) -> None:
        """Providers on this machine have it in their files, so the next start takes it again."""
        if former and former != port:
            self._say(
                f"port {former} of the bus is taken; it listens on {port}, so providers that were "
                "made before must be told: `./cocoon provider doctor` says how"
            )
        self._folder.keep_bus_port(port)

    async def _prepare_database(self) -> None:
        superuser = self._postgres.dsn(DATABASE)
        await apply_schema(superuser, self._shards)
        passwords = database_passwords(self._folder)
        await set_role_passwords(superuser, passwords)
        for role in DATABASE_ROLES:
            user = f"cocoon_{role}"
            dsn = self._postgres.dsn(DATABASE, user, passwords[user])
            write_private(self._folder.dsn(role), dsn.encode())

    async def _prepare_bus(self) -> None:
        nc = await self._bus("infra")
        try:
            await declare_streams(nc, self._shards)
        finally:
            await close(nc)

    async def _bus(self, role: str) -> BusClient:
        assert self._nats is not None  # noqa: S101 - started first
        return await connect(
            self._nats.url, self._folder.seed(role), f"devnet-{role}", inbox_prefix(role)
        )

    async def _first_account(self) -> None:
        """On the first start: an account with dev credit and a key; later the same ones."""
        nc = await self._bus("operator")
        try:
            self._account_id = await first_account(nc, self._folder, self._shards[1:])
        finally:
            await close(nc)

    async def _until_listed(self) -> None:
        """Until clients find every provider: the first request must not be told to come again."""
        nc = await self._bus("operator")
        listed = 0
        try:
            for _ in range(int(LISTED_WITHIN_S / LISTED_PAUSE_S)):
                with contextlib.suppress(Transient):
                    answer = await ask(nc, subjects.DIRECTORY_REQUEST, DirectoryRequest())
                    listed = len({e["provider_id"] for e in json.loads(answer)["providers"]})
                if listed >= len(self._providers):
                    return
                await asyncio.sleep(LISTED_PAUSE_S)
        finally:
            await close(nc)
        raise Unavailable(
            f"{listed} of {len(self._providers)} providers were listed within "
            f"{LISTED_WITHIN_S:.0f} s; {self._folder.logs} says why"
        )

    # ---- children ----

    def _service(self, name: str) -> Child:
        child = Child(
            name,
            self._command(name),
            {**_base_environment(), **self._environment(name)},
            self._folder.logs / f"{name}.log",
        )
        self._children[name] = child
        return child

    def _program(self, name: str) -> str:
        """The service that a process of this name runs."""
        if name in self._providers:
            return "provider"
        return "matcher" if name in self._matchers else name

    def _command(self, name: str) -> Sequence[str]:
        service = self._program(name)
        module = "cocoon.client" if name == "sidecar" else f"services.{service}"
        return [sys.executable, "-m", module]

    def _environment(self, name: str) -> dict[str, str]:
        assert self._nats is not None  # noqa: S101 - started first
        folder, program = self._folder, self._program(name)
        prefix = f"COCOON_{program.upper()}_"
        values: dict[str, str | Path | int] = {}
        if name == "sidecar":
            values = {
                "GATEWAY_URL": self.gateway_url,
                "TRUST_FILE": folder.trust,
                "API_KEY_FILE": folder.api_key,
                "LISTEN_PORT": self._sidecar_port,
                "STATE_DIR": folder.root / "sidecar",
            }
            if self._options.otlp_endpoint:
                values["OTLP_ENDPOINT"] = self._options.otlp_endpoint
            return {prefix + key: str(value) for key, value in values.items()}
        values = {"NATS_URL": self._nats.url, "NATS_SEED_FILE": folder.seed(name)}
        if program != "provider":
            values["POSTGRES_DSN_FILE"] = folder.dsn(program)
        if self._options.otlp_endpoint:
            values["OTLP_ENDPOINT"] = self._options.otlp_endpoint
        values.update(self._special(name))
        return {prefix + key: str(value) for key, value in values.items()}

    def _special(self, name: str) -> dict[str, str | Path | int]:
        folder = self._folder
        accounts = json.dumps(self._shards[1:])
        if name == "gateway":
            return {
                "LISTEN_PORT": self._gateway_port, "ACCOUNT_SHARDS": accounts, **self._bus_told(),
            }  # fmt: skip
        if name == "billing":
            return {"ACCOUNT_SHARDS": accounts}
        if name in self._matchers:
            return {"SHARD": self._matchers[name], "ACCOUNT_SHARDS": accounts}
        if name == "attestation":
            return {
                "TRUST_FILE": folder.trust,
                "POLICY_FILE": folder.policy,
                "ENVIRONMENT": "dev",
                "ENTRY_SEED_FILE": folder.seed("entry"),
                "ISSUER_SEED_FILE": folder.issuer,
                "BERTHS": self._nats.berths if self._nats else 0,
                # this machine's own providers come by the same door, but their lines never leave it
                "PLAIN_FROM": json.dumps([LOOPBACK, *self._own_addresses()]),
            }
        return self._of_provider(name) if name in self._providers else {}

    def _bus_told(self) -> dict[str, str | Path | int]:
        """What the gateway tells providers of the bus."""
        entry = self._options.entry
        if entry is None:
            return {"BUS_URLS": json.dumps([self._nats.url if self._nats else ""])}
        return {"BUS_URLS": json.dumps(entry.urls), "BUS_CA_FILE": self._folder.bus_ca}

    def _own_addresses(self) -> list[str]:
        return [self._nats.doors.host] if self._nats and self._nats.doors else []

    def _of_provider(self, name: str) -> dict[str, str | Path | int]:
        folder, options = self._folder, self._options
        values: dict[str, str | Path | int] = {
            "DATA_DIR": folder.provider_data(name),
            "TRUST_FILE": folder.trust,
            "ENVIRONMENT": "dev",
            "REGION": f"dev-{self._providers.index(name) + 1}",
        }
        if name in self._open:
            values["TEE_KIND"] = "none"
        else:
            values["DEV_AUTHORITY_FILE"] = folder.authority
            values["DEV_PLATFORM_FILE"] = folder.platform(name)
        if options.concurrency:
            values["CONCURRENCY"] = options.concurrency
        if options.key_epoch_s:
            values["EPOCH_S"] = str(options.key_epoch_s)
            values["OVERLAP_S"] = str(2 * options.key_epoch_s - 1)
        if name == self._embedder:
            return {**values, "MODEL_DIR": minilm.FOLDER, "MODEL_MANIFEST_FILE": minilm.MANIFEST}
        if options.backend_url:
            values["BACKEND_URL"] = options.backend_url
        if self._triton is not None:
            values["BACKEND_URL"] = self._triton.url
            values["BACKEND_METRICS_URL"] = self._triton.metrics_url
            values["BACKEND_CONTEXT_TOKENS"] = CONTEXT_TOKENS
            values["BACKEND_CAPABILITIES"] = json.dumps(CAPABILITIES)
        if options.model_name:
            values["MODEL_NAME"] = options.model_name
        return values

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self._gateway_port}"

    @property
    def sidecar_url(self) -> str:
        return f"http://127.0.0.1:{self._sidecar_port}/v1"

    def _running(self) -> RunningNetwork:
        assert self._nats is not None  # noqa: S101 - started first
        observe = {
            name: f"http://127.0.0.1:{child.ready['observe_port']}"
            for name, child in self._children.items()
            if child.ready.get("observe_port")
        }
        return RunningNetwork(
            network_id=self._network_id,
            gateway_url=self.gateway_url,
            sidecar_url=self.sidecar_url,
            nats_url=self._nats.url,
            nats_monitor_url=self._nats.monitor_url,
            observe_urls=observe,
            account_id=self._account_id,
            engine_metrics_url=self._triton.metrics_url if self._triton else None,
            shards=self._shards,
            entry_urls=self._options.entry.urls if self._options.entry else (),
            entry_gateway_url=self._options.entry.gateway_url if self._options.entry else "",
        )

    # ---- watch ----

    async def watch(self, stop: asyncio.Event) -> None:
        """Until `stop`: start what ends again. Raises Unavailable when it keeps ending."""
        assert self._nats is not None  # noqa: S101 - started first
        folder, postgres, nats = self._folder, self._postgres, self._nats
        start = partial(in_thread, postgres.start)
        parts = [
            Part("Postgres", folder.postgres, partial(_pid, postgres), start, is_server=True,
                 exit_code=partial(_exit_code, postgres)),
            Part("NATS", folder.nats, partial(_pid, nats), self._restart_nats, is_server=True,
                 is_ill=nats.is_ill, end=nats.stop, exit_code=partial(_exit_code, nats)),
        ]  # fmt: skip
        if self._triton is not None:
            pid, start = partial(_pid, self._triton), partial(in_thread, self._triton.start)
            code = partial(_exit_code, self._triton)
            parts.append(Part("Triton", folder.logs, pid, start, is_server=True, exit_code=code))
        parts += [
            Part(_called(name), child.log_file, partial(_pid, child), child.start,
                 exit_code=partial(_exit_code, child))
            for name, child in self._children.items()
        ]  # fmt: skip
        await Supervisor(parts, self._say, self._restarted).run(stop)

    async def _restart_nats(self) -> None:
        assert self._nats is not None  # noqa: S101 - started first
        await in_thread(self._nats.start)
        await self._prepare_bus()  # a lost store has no streams

    def _restarted(self) -> None:
        self._record()
        self._folder.write_running(self._running())  # it observes elsewhere now

    # ---- stop ----

    async def stop(self) -> None:
        """Stop everything: clients' door first, then providers, services, servers."""
        if self._door is not None:
            await self._door.stop()
        await self._stop_children("sidecar", "gateway")
        await self._stop_children(*self._providers)
        # Triton looks once a second whether it may go: meanwhile the others do
        triton = [asyncio.to_thread(self._triton.stop)] if self._triton else []
        await asyncio.gather(*triton, self._stop_servers())
        self._folder.running.unlink(missing_ok=True)
        self._folder.processes.unlink(missing_ok=True)

    async def _stop_servers(self) -> None:
        await self._stop_children(*self._matchers, "billing", "attestation")
        if self._nats is not None:
            await asyncio.to_thread(self._nats.stop)
        await asyncio.to_thread(self._postgres.stop)

    async def _stop_children(self, *names: str) -> None:
        children = [self._children[name] for name in names if name in self._children]
        await asyncio.gather(*(child.stop() for child in children))


def _pid(process: _Process) -> int | None:
    return process.pid


def _exit_code(process: _Process) -> int | None:
    return process.exit_code


def _called(name: str) -> str:
    """A service in a sentence: "the gateway", but "billing" and "provider-2"."""
    return name if name in ("attestation", "billing") or "-" in name else f"the {name}"


def _base_environment() -> dict[str, str]:
    """What children inherit: where programs and certificates are; no setting of Cocoon."""
    kept = (
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "SSL_CERT_FILE",
        "PYTHONPATH",
        "VIRTUAL_ENV",
    )
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONUNBUFFERED": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime's own, set again where it is imported
        "COCOON_ROOT": os.environ.get("COCOON_ROOT", "."),
    }


def check_backend(url: str) -> None:
    """Raises ConfigurationError for a backend address that cannot be used."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigurationError(
            f"{url} is not a backend's address; write http://127.0.0.1:8000/v1"
        )
