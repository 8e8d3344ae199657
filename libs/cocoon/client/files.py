"""Files of a state directory: whole or not there after a power loss, for one process at a time.

Every file is 0600. It never removes the lock's file: two processes could then hold one each.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from cocoon.kernel.errors import ConfigurationError

LOCK_FILE: Final = "client-lock"
_OTHERS: Final = 0o077


class HeldFolder:
    """A folder that no other client may use, of this process or another, until `release`.

    The kernel releases it, too, when the process ends, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigurationError, naming the folder, if it is held or cannot be made."""
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _unusable(folder, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigurationError(
                f"another client uses the state directory {folder}; close that one first, or "
                "name another directory"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise _unusable(folder, error) from None
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another client have it. May be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have the descriptor, too
            os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of the one before: after a power loss it is one of the two, whole.

    Blocks for as long as the disk takes. Raises OSError.
    """
    draft = path.with_name(path.name + ".new")
    _write(draft, data)
    draft.replace(path)
    _sync_folder(path.parent)


def read_secret(path: Path) -> bytes:
    """A file that only its owner may read. Raises OSError, ConfigurationError if others may."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & _OTHERS:
            raise ConfigurationError(f"others may read {path}; chmod 600 it")
        return file.read()


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before it has its name


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} cannot be made or locked ({error.strerror}); name another state directory"
    )
