"""Runs an installer of infra/ at first use, bounded in time, and says why where it fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cocoon.kernel.errors import ConfigurationError

CHECKOUT: Final = Path(__file__).resolve().parents[3]
INSTALL_TIMEOUT_S: Final = 900.0


def install(part: str, name: str, say: Callable[[str], None]) -> None:
    """Run infra/PART/install.sh, which does nothing where its work is done.

    `say` gets a line about what takes long. Raises ConfigurationError with the script's sentence.
    """
    script = CHECKOUT / "infra" / part / "install.sh"
    if not script.exists():
        raise ConfigurationError(f"{name} is installed from a checkout of Cocoon only")
    try:
        with subprocess.Popen(
            [str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        ) as running, _ended_after(running, INSTALL_TIMEOUT_S):  # fmt: skip
            assert running.stdout is not None  # noqa: S101 - asked for above
            for line in running.stdout:
                say(line.strip())
            _, wrong = running.communicate()
    except OSError as error:
        wrong, code = str(error.strerror), 1
    else:
        code = running.returncode
    if code != 0:
        last = "; ".join(line.strip() for line in wrong.splitlines()[-4:] if line.strip())
        raise ConfigurationError(last or f"{name} was not installed in time")


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[str], timeout_s: float) -> Iterator[None]:
    """End the process's whole session when it takes too long or the caller leaves."""
    timer = threading.Timer(timeout_s, _kill, (process,))
    timer.start()
    try:
        yield
    except BaseException:
        _kill(process)
        raise
    finally:
        timer.cancel()


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
