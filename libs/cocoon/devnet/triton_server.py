"""A real Triton Inference Server on loopback that serves the checkout's model repository.

Its packages lie in an environment of their own, made on demand by infra/triton/install.sh. Only its
gRPC and metrics doors are open, and the gRPC calls that could make it write down tensors are shut.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cocoon.devnet import installing
from cocoon.devnet.ports import accepts, free_port
from cocoon.kernel.errors import ConfigurationError, Unavailable

MODEL: Final = "skills-1"
CONTEXT_TOKENS: Final = 640
CAPABILITIES: Final = ("logprobs", "logit_bias", "penalties", "seed")
EXIT_TIMEOUT_S: Final = (
    2  # whoever asks it has ended before; it waits in vain for what was cancelled
)
_SHUT: Final = "shared-memory,model-repository,logging,trace"
_CHECKOUT: Final = installing.CHECKOUT
_POLL_S: Final = 0.02


def install(say: Callable[[str], None]) -> None:
    """Make the server's environment unless it stands. Raises ConfigurationError saying why not.

    `say` gets a line about what takes long.
    """
    installing.install("triton", "Triton", say)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class TritonServer:
    """One server; its log is `log_file`. The ports are picked once and kept over restarts."""

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self._port = free_port()
        self._metrics_port = free_port()
        self._shared = f"cocoon-{hashlib.sha256(str(log_file).encode()).hexdigest()[:16]}-"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self._port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self._metrics_port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Of the process that ended by itself; negative: the signal."""
        return self._process.poll() if self._process else None

    def shared_memory(self) -> list[Path]:
        """Where the server and its models' processes pass requests and answers to each other."""
        return list(Path("/dev/shm").glob(f"{self._shared}*"))  # noqa: S108 - the kernel's own

    def start(self, timeout_s: float = 60.0) -> None:
        """Start it and wait until its doors are open, which is after the model is loaded.

        Raises ConfigurationError (not installed) or Unavailable (read the log).
        """
        if self.pid is not None:
            return
        self._remove_shared_memory()  # a killed one's
        with contextlib.ExitStack() as stack:
            log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            stack.callback(os.close, log)
            self._process = subprocess.Popen(
                self._command(), env=_environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True, cwd=self.log_file.parent,
            )  # fmt: skip
        deadline = time.monotonic() + timeout_s
        while not (accepts(self._port) and accepts(self._metrics_port)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Unavailable(f"the Triton server did not start; {self.log_file} says why")
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = EXIT_TIMEOUT_S + 10.0) -> None:
        """Let it finish for EXIT_TIMEOUT_S; after `timeout_s` it is killed."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and the processes of its models."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            _kill(process)
            process.wait(10)
        self._remove_shared_memory()

    def _remove_shared_memory(self) -> None:
        for region in self.shared_memory():
            region.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        options = {
            "model-repository": _CHECKOUT / "infra" / "triton" / "models",
            "backend-directory": _environment_folder() / "backends",
            "backend-config": f"python,shm-region-prefix-name={self._shared}",
            "log-file": self.log_file,
            "grpc-address": "127.0.0.1",
            "grpc-port": self._port,
            "grpc-restricted-protocol": f"{_SHUT}:{secrets.token_hex(8)}={secrets.token_hex(16)}",
            "allow-http": "false",
            "metrics-address": "127.0.0.1",
            "metrics-port": self._metrics_port,
            "allow-gpu-metrics": "false",
            "pinned-memory-pool-byte-size": 0,
            "exit-timeout-secs": EXIT_TIMEOUT_S,
        }
        parts = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [_installed()[0], *parts, "--disable-auto-complete-config"]


def _environment_folder() -> Path:
    return _CHECKOUT / ".cocoon-triton"


def _installed() -> tuple[str, str]:
    """The server's program and the folders of its libraries, as the installer wrote them down."""
    try:
        program, libraries = (
            (_environment_folder() / "server").read_text(encoding="utf-8").splitlines()
        )
    except (OSError, ValueError):
        raise ConfigurationError("Triton is not installed; run infra/triton/install.sh") from None
    return program, libraries


def _environment() -> dict[str, str]:
    """Where programs and libraries are, and nothing else of ours."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    path = f"{_environment_folder() / 'bin'}:{os.environ.get('PATH', os.defpath)}"
    own = {"LD_LIBRARY_PATH": _installed()[1], "ORT_DISABLE_TELEMETRY": "1"}
    return {**kept, "PATH": path, **own}
