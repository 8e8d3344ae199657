"""A provider's home: a network namespace whose only way out is one address of this machine.

What listens there (a userspace forwarder: the kernel's own address translation needs tools that a
machine may lack) is the home's router. Needs root and `ip`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


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


@dataclass
class TranslatedHome:
    """A home behind a router in a namespace of its own: nothing outside can dial into it, and what
    it dials by `server`'s name arrives from the router's address.
    """

    name: str
    router: str  # the router's namespace
    outside: str  # this machine's address, as the router sees it
    ports: tuple[int, ...]
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def command(self, *program: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *program]

    def start_router(self) -> None:
        ports = map(str, self.ports)
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", self.router, sys.executable, "-m", "tests.support.forwarder",
             self.outside, *ports],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def stop_router(self) -> None:
        """As if it lost its power: every line through it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def translated_home(server: str, ports: tuple[int, ...]) -> Iterator[TranslatedHome]:
    """A home whose router carries these ports to this machine, which home calls `server`."""
    mark = secrets.token_hex(3)
    home_name, router = f"cocoon-{mark}h", f"cocoon-{mark}r"
    near, far = f"10.{200 + secrets.randbelow(25)}.{secrets.randbelow(256)}", (
        f"10.{225 + secrets.randbelow(25)}.{secrets.randbelow(256)}"
    )  # fmt: skip
    names = Path("/etc/netns") / home_name
    place = TranslatedHome(home_name, router, f"{far}.1", ports)
    try:
        for name in (home_name, router):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", f"co{mark}o", "type", "veth", "peer", "name", "wan", "netns", router)
        _ip("addr", "add", f"{far}.1/30", "dev", f"co{mark}o")
        _ip("link", "set", f"co{mark}o", "up")
        _ip("-n", router, "addr", "add", f"{far}.2/30", "dev", "wan")
        _ip("-n", router, "link", "set", "wan", "up")
        _ip("-n", router, "link", "add", "lan", "type", "veth", "peer", "name", "eth0",
            "netns", home_name)  # fmt: skip
        for name, device, address in (
            (router, "lan", f"{near}.1"),
            (home_name, "eth0", f"{near}.2"),
        ):
            _ip("-n", name, "addr", "add", f"{address}/30", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
        names.mkdir(parents=True)
        (names / "hosts").write_text(f"127.0.0.1 localhost\n{near}.1 {server}\n")
        place.start_router()
        yield place
    finally:
        place.stop_router()
        subprocess.run(["ip", "link", "del", f"co{mark}o"], check=False, capture_output=True)
        for name in (home_name, router):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        shutil.rmtree(names, ignore_errors=True)
