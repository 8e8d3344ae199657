"""Coming in: a stranger enrols from the bus's lobby, and connects again into a place of its own."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Final

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.messages import EnrolRequest
from cocoon.kernel.errors import Transient, Unavailable
from cocoon.telemetry.logs import get_logger

if TYPE_CHECKING:
    from cocoon.bus.client import BusClient
    from cocoon.bus.service import Stop

_log = get_logger("cocoon.provider.entering")
REQUEST_TIMEOUT_S: Final = 15.0
RECONNECT_S: Final = 15.0
FIRST_BACKOFF_S: Final = 0.25
LONGEST_BACKOFF_S: Final = 30.0
IN_LOBBY: Final = "in_lobby"  # the code of a refusal that another connection cures


async def enter(nc: BusClient, provider_id: str, request: EnrolRequest) -> None:
    """Enrol, and connect again if this connection came in as a stranger's.

    Raises the tree's errors: Transient when it may be tried again, Rejected for one who is banned.
    """
    subject = subjects.attestation(provider_id, "enrol")
    for _ in range(2):
        told = json.loads(await ask(nc, subject, request, REQUEST_TIMEOUT_S) or "{}")
        if not (isinstance(told, dict) and told.get("reconnect")):
            return
        _log.info("entering", provider_id=provider_id)
        try:
            await nc.reconnect(RECONNECT_S)
        except TimeoutError:
            raise Unavailable("the bus did not take this agent back in time") from None
    raise Unavailable("the bus has no place for this agent yet; it tries again")


async def enter_patiently(
    nc: BusClient, provider_id: str, request: EnrolRequest, stop: Stop
) -> bool:
    """Enter as soon as the network takes it; False if the process is asked to end meanwhile."""
    pause_s = FIRST_BACKOFF_S
    ending = asyncio.create_task(stop.wait())
    try:
        while not ending.done():
            try:
                await enter(nc, provider_id, request)
                return True
            except Transient as error:
                _log.warning("not_entered", code=error.code, delay_s=pause_s)
                await asyncio.wait({ending}, timeout=pause_s)
                pause_s = min(pause_s * 2, LONGEST_BACKOFF_S)
        return False
    finally:
        ending.cancel()
