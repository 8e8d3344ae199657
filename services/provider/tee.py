"""Where quotes come from: Intel TDX by the kernel's report interface, or a simulated machine.

The simulated one is DEV ONLY; its evidence counts only where a dev trust file names its root. A
machine without a TEE has no quote: its identity key speaks for it, in the open tier and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from nacl.signing import SigningKey

from cocoon.evidence.claims import TeeKind
from cocoon.evidence.open_tier import make_statement
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import ConfigurationError, Unavailable

if TYPE_CHECKING:
    from cocoon.devnet.authority import DevAuthority
    from cocoon.devnet.dev_platform import DevPlatform

TSM_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
MAX_QUOTE_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Quoted:
    """A quote over report data, and collateral where the machine supplies it (JSON text)."""

    kind: TeeKind
    quote: bytes
    collateral: str | None


class QuoteSource(Protocol):
    """A machine that vouches for 64 bytes of report data."""

    @property
    def kind(self) -> TeeKind:
        """What its quotes will be: the claims that they cover say it too."""

    async def quote(self, report_data: bytes) -> Quoted:
        """Raises Unavailable or ConfigurationError."""


class OpenSource:
    """No TEE: the provider's identity key signs the report data. Works in every environment."""

    kind = TeeKind.NONE

    def __init__(self, identity: SigningKey) -> None:
        self._identity = identity

    async def quote(self, report_data: bytes) -> Quoted:
        return Quoted(self.kind, make_statement(self._identity, report_data), None)


class SimulatedTdx:
    """DEV ONLY: a machine that the devnet's authority plays."""

    kind = TeeKind.TDX

    def __init__(self, authority: DevAuthority, clock: Clock, platform: DevPlatform) -> None:
        self._authority = authority
        self._clock = clock
        self._platform = platform

    async def quote(self, report_data: bytes) -> Quoted:
        return await asyncio.to_thread(self._quote, report_data)

    def _quote(self, report_data: bytes) -> Quoted:
        quote = self._platform.quote(report_data)
        return Quoted(TeeKind.TDX, quote, self._authority.collateral(self._clock.now_ms()))


class KernelTdx:
    """A real trust domain: configfs-tsm (Linux 6.7 on) asks the module for the quote.

    Collateral is left to the attestation service. Not tried on hardware by this project yet.
    """

    kind = TeeKind.TDX

    def __init__(self, reports: Path = TSM_REPORTS) -> None:
        if not reports.is_dir():
            raise ConfigurationError(
                f"{reports} is not there: this is no TDX guest, or its kernel is older than 6.7. "
                "On a development network name its authority's file instead"
            )
        self._reports = reports

    async def quote(self, report_data: bytes) -> Quoted:
        return Quoted(TeeKind.TDX, await asyncio.to_thread(self._read, report_data), None)

    def _read(self, report_data: bytes) -> bytes:
        entry = self._reports / f"cocoon-{os.getpid()}"
        try:
            entry.mkdir(exist_ok=True)
            try:
                (entry / "inblob").write_bytes(report_data)
                quote = (entry / "outblob").read_bytes()
                provider = (entry / "provider").read_text().strip()
            finally:
                with contextlib.suppress(OSError):
                    entry.rmdir()
        except OSError as error:
            raise Unavailable(f"the kernel gave no quote ({error.strerror})") from None
        if provider != "tdx_guest" or not 0 < len(quote) <= MAX_QUOTE_BYTES:
            raise ConfigurationError("the kernel's report is not a TDX quote")
        return quote


def simulated_tdx(authority_file: Path, platform_file: Path | None, clock: Clock) -> SimulatedTdx:
    """A simulated machine from its files; without a platform's file, a new one for this boot.

    Raises ConfigurationError if they cannot be read.
    """
    # a production provider never loads this code
    from cocoon.devnet.authority import DevAuthority
    from cocoon.devnet.dev_platform import DevPlatform

    authority = DevAuthority.load(authority_file)
    if platform_file is not None:
        return SimulatedTdx(authority, clock, DevPlatform.load(platform_file))
    return SimulatedTdx(authority, clock, authority.platform(clock.now_ms()))
