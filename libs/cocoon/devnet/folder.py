"""The one folder that holds a development network: paths, secrets, and who runs it now.

Secrets are files of mode 0600. A lock says that a network runs from here; the kernel drops it
with the process, so a crash leaves nothing stale behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cocoon.contracts.base import MappingContract
from cocoon.devnet.private_file import write_private
from cocoon.kernel.errors import ConfigurationError

# What a network makes in its folder; beside the lock, only these are ever removed.
_MADE = re.compile(
    r"account_shards|bus_port|bus-ca\.pem|logs|nats|policy\.json|postgres|(processes|running)\.(json|new)"
    r"|provider(-\d+)?|open-\d+|secrets|sidecar|trust\.json"
)
_LOCK = "lock"
_MODELS = "models"  # manifests of `model add`; no network makes or removes them
_CHECKOUT = Path(__file__).resolve().parents[3]
MIN_FREE_BYTES = 512 * 1024 * 1024


class RunningNetwork(MappingContract):
    """What a running network tells the other commands: addresses and files, no secrets."""

    network_id: str
    gateway_url: str
    sidecar_url: str
    nats_url: str
    nats_monitor_url: str
    observe_urls: dict[str, str]
    account_id: str
    engine_metrics_url: str | None = None
    shards: tuple[int, ...]
    entry_urls: tuple[str, ...] = ()  # where providers elsewhere come in
    entry_gateway_url: str = ""  # and where they ask the gateway


class DataFolder:
    """Paths under one folder; everything that a network writes is below it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.postgres = self.root / "postgres"
        self.nats = self.root / "nats"
        self.secrets = self.root / "secrets"
        self.logs = self.root / "logs"
        self.trust = self.root / "trust.json"
        self.policy = self.root / "policy.json"
        self.authority = self.secrets / "authority.json"
        self.api_key = self.secrets / "api_key"
        self.issuer = self.secrets / "issuer.nk"  # signs logins of providers
        self.bus_ca = self.root / "bus-ca.pem"  # for providers elsewhere
        self.bus_ca_key = self.secrets / "bus-ca.key"
        self.bus_certificate = self.secrets / "bus.pem"
        self.bus_key = self.secrets / "bus.key"
        self.models = self.root / _MODELS
        self.running = self.root / "running.json"
        self.processes = self.root / "processes.json"
        self._shards = self.root / "account_shards"
        self._bus_port = self.root / "bus_port"
        self._lock_file = self.root / _LOCK

    def seed(self, name: str) -> Path:
        """The NATS seed of a role or a provider."""
        return self.secrets / f"{name}.nk"

    def platform(self, provider: str) -> Path:
        """The file with a provider's simulated machine."""
        return self.secrets / f"platform-{provider}.json"

    def provider_data(self, provider: str) -> Path:
        """Where a provider keeps its spool."""
        return self.root / provider

    def dsn(self, role: str) -> Path:
        """The file with a database role's connection string."""
        return self.secrets / f"{role}.dsn"

    def prepare(self) -> None:
        """Make the folder. Raises ConfigurationError if that fails or the disk is full."""
        try:
            for folder in (self.root, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self.secrets.mkdir(mode=0o700, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise self._not_made(error) from None
        if free < MIN_FREE_BYTES:
            raise ConfigurationError(
                f"the disk of {self.root} has {free // 2**20} MiB free and the network needs "
                f"{MIN_FREE_BYTES // 2**20}; free some space, or name another --data DIR"
            )

    def account_shards(self, asked: int | None) -> int:
        """How many account shards this network has: what it was made with, else what is asked for.

        Raises ConfigurationError when both are named and differ: an account's place follows from
        the number.
        """
        try:
            made: int | None = int(self._shards.read_text(encoding="ascii"))
        except FileNotFoundError:
            made = 1 if (self.secrets / "network_id").exists() else None
        except ValueError:
            raise ConfigurationError(
                f"{self._shards} does not hold a number; --fresh starts anew"
            ) from None
        if made is not None and asked not in (None, made):
            raise ConfigurationError(
                f"the network in {self.root} was made with --shards {made}; start it so, name "
                "another folder with --data DIR, or forget everything in it with --fresh"
            )
        return made or asked or 1

    def keep_account_shards(self, count: int) -> None:
        """Write down with how many account shards this network is made."""
        self._shards.write_text(f"{count}\n", encoding="ascii")

    def bus_port(self) -> int:
        """The port that the bus had at the last start without other doors; 0 if there was none.

        Providers on this machine have it in their files.
        """
        try:
            return int(self._bus_port.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return 0

    def keep_bus_port(self, port: int) -> None:
        """Write down where the bus listens, for the next start."""
        self._bus_port.write_text(f"{port}\n", encoding="ascii")

    def _not_made(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"the data folder {self.root} cannot be made or written ({error.strerror}); "
            "name another one with --data DIR"
        )

    def check_ours(self) -> None:
        """Raises ConfigurationError for a folder that is somebody's; touches nothing in it.

        A network's folder is one with a network in it, or one that is empty or not there yet.
        """
        for place, name in ((Path("~").expanduser(), "your home folder"), (_CHECKOUT, "Cocoon's")):
            if self.root == place.resolve():
                raise ConfigurationError(
                    f"{self.root} is {name}, so no network is kept in it; name a folder of its "
                    f"own, for example --data {self.root / '.cocoon'}"
                )
        try:
            if (self.secrets / "network_id").exists() or all(map(_is_bare, self.root.iterdir())):
                return
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._not_made(error) from None
        raise ConfigurationError(
            f"{self.root} holds files and is not a network's folder, so nothing in it was changed; "
            "name an empty or a new folder with --data DIR"
        )

    def clear(self) -> tuple[list[str], list[str]]:
        """Remove what a network made, but the lock: `--fresh`. The names removed, those left."""
        removed, left = [], []
        for path in sorted(self.root.iterdir()):
            if _MADE.fullmatch(path.name) is None:
                if path.name != _LOCK:
                    left.append(path.name)
                continue
            removed.append(path.name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return removed, left

    def secret(self, path: Path, make: Callable[[], bytes]) -> bytes:
        """The bytes in a secret file, made first if it is not there."""
        if not path.exists():
            write_private(path, make())
        return path.read_bytes()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Raises ConfigurationError naming the process that holds it, or for a
        folder that cannot be made or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = self._lock_file.open("a+")
        except OSError as error:
            raise self._not_made(error) from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ConfigurationError(
                    f"a network already runs from {self.root} (process {holder}); stop it with "
                    "Ctrl-C where it runs, or start another with --data DIR"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def is_running(self) -> bool:
        """Whether some process holds the folder now."""
        try:
            with self._lock_file.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def read_running(self) -> RunningNetwork:
        """The running network's addresses. Raises ConfigurationError if none runs from here."""
        if not self.is_running() or not self.running.exists():
            raise ConfigurationError(
                f"no network runs from {self.root}; start one with `./cocoon up`, "
                "or name its folder with --data DIR"
            )
        return RunningNetwork.model_validate_json(self.running.read_bytes())

    def write_processes(self, pids: dict[str, int | None]) -> None:
        """Who runs as which process, for a person who looks or a test that kills."""
        fresh = self.processes.with_suffix(".new")
        fresh.write_text(json.dumps(pids, indent=1), encoding="utf-8")
        fresh.replace(self.processes)

    def read_processes(self) -> dict[str, int | None]:
        """The last record of who runs as which process; empty without one."""
        try:
            recorded = json.loads(self.processes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(recorded) if isinstance(recorded, dict) else {}

    def write_running(self, network: RunningNetwork) -> None:
        fresh = self.running.with_suffix(".new")
        fresh.write_text(json.dumps(network.model_dump(mode="json"), indent=1), encoding="utf-8")
        fresh.replace(self.running)


def _is_bare(path: Path) -> bool:
    """Whether this is what a start that was cut off at once leaves, a disk's own, or manifests."""
    if path.name in (_LOCK, "lost+found"):
        return True
    if path.name == _MODELS and path.is_dir() and not path.is_symlink():
        return all(file.suffix == ".json" for file in path.iterdir())
    made = _MADE.fullmatch(path.name) is not None
    return made and path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def default_root() -> Path:
    """`.cocoon` in the checkout, or in the working folder when Cocoon is installed as a package."""
    return Path(os.environ.get("COCOON_ROOT", ".")) / ".cocoon"
