"""Asking how this agent stands: a word that the network took back is noticed within seconds.

One question at an interval, with a part of chance. Where new evidence may help it is sent at once;
where it cannot (a ban, a canary's verdict) the agent asks more seldom, until that is lifted.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

from cocoon.agent.dropped import BARRED
from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import CocoonError

if TYPE_CHECKING:
    from nats.aio.client import Client

    from services.provider.announcing import Announcer

ASK_S: Final = 5.0
BARRED_TIMES: Final = 8  # an interval while barred is so many
JITTER: Final = 0.25  # the part of an interval that is left to chance
MAX_REASON_CHARS: Final = 64


class StandingWatch:
    """Tells the announcer's standing what the network says of this agent."""

    def __init__(
        self, nc: Client, provider_id: str, announcer: Announcer, clock: Clock,
        randomness: Randomness, *, interval_s: float,
    ) -> None:  # fmt: skip
        self._nc = nc
        self._provider_id = provider_id
        self._announcer = announcer
        self._clock = clock
        self._randomness = randomness
        self._interval_s = interval_s

    async def run(self) -> None:
        """Ask until cancelled. A question that is not answered is the next one's business."""
        while True:
            await asyncio.sleep(self._pause_s())
            await self.look()

    def _pause_s(self) -> float:
        times = BARRED_TIMES if self._announcer.standing.barred else 1
        chance = int.from_bytes(self._randomness.token(2), "big") / 65_536
        return self._interval_s * times * (1 + JITTER * (chance - 0.5))

    async def look(self) -> None:
        """Ask once, and act on the answer."""
        standing = self._announcer.standing
        proved = standing.proved
        subject = subjects.attestation(self._provider_id, "standing")
        try:
            told = json.loads(await ask(self._nc, subject, None, ASK_S))
        except (CocoonError, ValueError):
            return
        if not isinstance(told, dict) or standing.proved != proved:
            return  # it was proved meanwhile: an older answer says nothing
        banned = told.get("banned") is True
        if told.get("attested") is True:
            if not banned:  # else it is being revoked now, and the next answer says why
                standing.stands()
            return
        reason, at_ms = self._why(told, banned=banned)
        news = standing.dropped(reason, at_ms)
        barred, standing.barred = standing.barred, standing.barred or banned
        if not banned and (news or barred):
            self._announcer.prove_again()  # while it fails, the announcer tries on by itself

    def _why(self, told: dict[str, Any], *, banned: bool) -> tuple[str, int]:
        revoked = told.get("revoked")
        found = revoked if isinstance(revoked, dict) else {}
        reason, at_ms = found.get("reason"), found.get("at_ms")
        if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARS:
            reason = "not_attested"
        if banned and reason not in BARRED:
            reason = "banned"
        return reason, at_ms if isinstance(at_ms, int) else self._clock.now_ms()
