"""A provider's home: a network namespace whose only way out is one address of this machine.

What listens there (a userspace forwarder: the kernel's own address translation needs tools that a
machine may lack) is the home's router. Needs root and `ip`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Home:
    name: str
    router: str  # this machine's address, as the home sees it

    def command(self, *program: str) -> list[str]:
        """The program, run at home."""
        return ["ip", "netns", "exec", self.name, *program]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def possible() -> bool:
    """Whether this machine lets us make one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"cocoon-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.SubprocessError):
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def home() -> Iterator[Home]:
    """A home that lasts for the block."""
    mark = secrets.token_hex(3)
    name, outside, inside = f"cocoon-{mark}", f"co{mark}o", f"co{mark}i"
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        _ip("addr", "add", f"{net}.1/30", "dev", outside)
        _ip("link", "set", outside, "up")
        _ip("-n", name, "addr", "add", f"{net}.2/30", "dev", inside)
        _ip("-n", name, "link", "set", inside, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield Home(name, f"{net}.1")
    finally:
        subprocess.run(["ip", "link", "del", outside], check=False, capture_output=True)
        _ip("netns", "del", name)
