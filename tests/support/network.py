"""A whole network for a test: `cocoon up --json` in a process of its own, with real everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from cocoon.devnet.child import die_with_parent
from cocoon.devnet.folder import DataFolder, RunningNetwork

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90


@dataclass
class LiveNetwork:
    """A running network. Use it as a context manager; `data` holds everything that it writes."""

    data: Path
    options: tuple[str, ...] = ()
    ready: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def folder(self) -> DataFolder:
        return DataFolder(self.data)

    @property
    def running(self) -> RunningNetwork:
        return self.folder.read_running()

    @property
    def sidecar(self) -> str:
        return self.ready["sidecar"]

    @property
    def gateway(self) -> str:
        return self.ready["gateway"]

    @property
    def api_key(self) -> str:
        return self.ready["api_key"]

    @property
    def output(self) -> Path:
        return self.data.with_name(self.data.name + ".stderr")

    def start(self, *more: str) -> None:
        """Start it and wait for the one line. Raises AssertionError with what it said."""
        with self.output.open("ab") as stderr:
            self.process = subprocess.Popen(
                self.command("up", "--json", "--gateway-port", "0", "--sidecar-port", "0",
                             *self.options, *more),
                cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
                # a killed test run ends it cleanly; pytest has no threads here
                preexec_fn=die_with_parent(signal.SIGINT),  # noqa: PLW1509
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.stop()
        assert line, f"cocoon up said: {self.output.read_text()[-2000:]}"
        self.ready = json.loads(line)

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            if process.stdout:
                process.stdout.close()

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "cocoon.cli", verb, "--data", str(self.data), *arguments]

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an operator's command (the noun, its verb, then options) on this network."""
        return subprocess.run(
            [sys.executable, "-m", "cocoon.cli", *arguments, "--data", str(self.data)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def pid(self, name: str) -> int:
        """The process id of a service, "nats" or "postgres"."""
        pids: dict[str, Any] = json.loads(self.folder.processes.read_text())
        return int(pids[name])

    def send(self, name: str, what: signal.Signals) -> None:
        """A signal to one process by its id, for example SIGSTOP."""
        os.kill(self.pid(name), what)

    def kill(self, name: str, by: signal.Signals = signal.SIGKILL) -> None:
        """Kill one process by its id and return when it has gone."""
        pid = self.pid(name)
        os.kill(pid, by)
        deadline = time.monotonic() + 20
        while _alive(pid):
            assert time.monotonic() < deadline, f"{name} does not die"
            time.sleep(0.02)

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float = 30) -> None:
        """Until the supervisor has started `name` again and the network serves."""
        deadline = time.monotonic() + timeout_s
        while self.pid(name) == old_pid:
            assert time.monotonic() < deadline, f"{name} was not started again"
            time.sleep(0.05)

    def balance(self) -> dict[str, Any]:
        """The first account's balance, as the gateway tells it."""
        answer = httpx.get(
            f"{self.gateway}/v1/balance",
            headers={"Authorization": f"Bearer {self.api_key}"},
            timeout=10,
            trust_env=False,
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
