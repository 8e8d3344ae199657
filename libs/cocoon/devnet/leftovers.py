"""What a killed `cocoon up` has left running: found again, ended, and told.

A process is taken for a leftover only if the folder's record names its id and its command line or
environment names the folder: ids are used again by the system.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil

from cocoon.devnet.folder import DataFolder

SERVERS = ("triton", "nats", "postgres")  # after the services, which use them
ASK_S, KILL_S = 10.0, 5.0


def end_leftovers(folder: DataFolder) -> list[str]:
    """End what still runs of this folder's last network; return the names.

    Call it with the folder's lock held: then nothing that runs from it is anybody's.
    """
    found = _found(folder)
    services = [name for name in found if name not in SERVERS]
    servers = [name for name in SERVERS if name in found]
    for group in (services, servers):
        _end([(name, found[name]) for name in group])
    folder.processes.unlink(missing_ok=True)
    return [*services, *servers]


def still_running(folder: DataFolder) -> dict[str, int]:
    """What a killed network has left: names and process ids; empty while one runs."""
    return {} if folder.is_running() else {name: p.pid for name, p in _found(folder).items()}


def _found(folder: DataFolder) -> dict[str, psutil.Process]:
    try:
        recorded = json.loads(folder.processes.read_text(encoding="utf-8"))
        pids = {str(name): int(pid) for name, pid in recorded.items() if pid is not None}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    found = {}
    for name, pid in pids.items():
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(pid)
            if _is_of(process, folder.root):
                found[name] = process
    return found


def _is_of(process: psutil.Process, root: Path) -> bool:
    """Whether the process was started for this folder. A zombie was not: it has ended."""
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    inside = f"{root}/"
    if any(part.startswith(inside) for part in process.cmdline()):
        return True
    try:
        return any(value.startswith(inside) for value in process.environ().values())
    except psutil.Error:
        return False


def _end(processes: Sequence[tuple[str, psutil.Process]]) -> None:
    for name, process in processes:
        with contextlib.suppress(psutil.Error):
            # Postgres' quick end is SIGINT; on SIGTERM it would wait for its clients
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
    _, alive = psutil.wait_procs([process for _, process in processes], timeout=ASK_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_S)
