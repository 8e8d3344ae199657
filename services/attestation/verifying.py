"""The pure verifier at work: in threads, so many at once, under floors that only rise."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cocoon.evidence.collateral import CollateralFloors
from cocoon.evidence.policy import SignedPolicy
from cocoon.evidence.provider import ProviderEvidence, verify_provider
from cocoon.evidence.trust import TrustAnchors
from cocoon.evidence.verdict import Verdict
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import RateLimited
from cocoon.telemetry import metrics
from services.attestation import store

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool


class Verifier:
    """`at_once` verifications run, `waiting` more may wait. Call `load` before `verify`."""

    def __init__(
        self, trust: TrustAnchors, signed: SignedPolicy, pool: Pool, clock: Clock,
        *, at_once: int, waiting: int,
    ) -> None:  # fmt: skip
        self._trust, self._signed = trust, signed
        self._pool = pool
        self._clock = clock
        self._limit = at_once + waiting
        self._threads = ThreadPoolExecutor(at_once, "verify")
        self._verifying = 0
        self._floors = CollateralFloors()
        self.floors_rose = False  # set here, cleared by whoever judges standing evidence again

    async def load(self) -> None:
        """Read the floors that were seen before."""
        self._floors = await store.load_floors(self._pool)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def check_room(self) -> None:
        """Raises RateLimited if too many verifications run and wait."""
        if self._verifying >= self._limit:
            raise RateLimited(
                "many providers attest at this moment; send the same evidence again shortly",
                code="busy",
                retry_after_s=2,
            )

    async def verify(self, evidence: ProviderEvidence) -> Verdict:
        """Verify in a thread; floors that authentic collateral raised are kept before it counts."""
        self._verifying += 1
        began_s = self._clock.monotonic_s()
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(
                self._threads, verify_provider, evidence, self._trust, self._signed, self._floors,
                self._clock.now_ms(),
            )  # fmt: skip
        finally:
            self._verifying -= 1
            metrics.VERIFY_SECONDS.observe(self._clock.monotonic_s() - began_s)
        if verdict.floors is not None:
            await self._raise_floors(verdict.floors)
        return verdict

    async def _raise_floors(self, seen: CollateralFloors) -> None:
        risen = self._floors
        for fmspc, floor in seen.by_fmspc.items():
            risen = risen.raised(fmspc, floor)
        if risen is not self._floors:
            await store.raise_floors(self._pool, risen)
            for fmspc, floor in self._floors.by_fmspc.items():  # another verdict may have raised it
                risen = risen.raised(fmspc, floor)
            self._floors = risen
            self.floors_rose = True
