"""An unprivileged account for servers that refuse to run as root, and the right to walk to them.

Parent folders get nothing but the right to be passed through: nobody new may list or read them.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from cocoon.kernel.errors import ConfigurationError

_ACCOUNTS = ("postgres", "nobody", "daemon")  # taken as they exist; none is ever created


def account() -> pwd.struct_passwd | None:
    """The account to run a server as, or None when this process is not root.

    Raises ConfigurationError if no unprivileged account exists.
    """
    if os.geteuid() != 0:
        return None
    for name in _ACCOUNTS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ConfigurationError(
        "Postgres does not run as root and no unprivileged account exists; add one named postgres"
    )


def allow_passage(path: Path) -> None:
    """Let every parent folder of `path` be passed through (o+x), never listed or read."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod((mode & 0o7777) | 0o001)


def give(path: Path, owner: pwd.struct_passwd | None) -> None:
    """Make `owner` (or nobody new) own `path`."""
    if owner is not None:
        os.chown(path, owner.pw_uid, owner.pw_gid)
