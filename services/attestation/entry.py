"""The bus's door: who a connection is, and where it may come in. A login for an hour at most.

The server asks, this answers: whoever proves a key comes in, a provider with a berth into its
berth, everybody else into the lobby, where one can enrol and nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import nats.errors
from nacl.signing import SigningKey

from cocoon.bus import accounts, permissions
from cocoon.bus.callout import Place, Question, admit, identity_of, read_question, refuse
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import CocoonError, Forbidden, RateLimited
from cocoon.kernel.ids import provider_id
from cocoon.kernel.pace import Bucket, Buckets
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.attestation import store
from services.attestation.berths import Berth, Berths
from services.attestation.settings import AttestationSettings

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from cocoon.bus.client import BusClient
    from cocoon.eventlog.connection import Pool

log = get_logger("services.attestation.entry")
WORKERS = 16  # questions being answered
WAITING = 2048  # beyond them the server hears nothing, and the client comes again
LOGINS_PER_S, LOGINS_AT_ONCE = 0.5, 20  # of one key
REMEMBERED = 16_384  # keys whose logins are counted, and addresses whose strangers are
IPV6_PREFIX = 64  # what one customer has at least
TAKE_TRIES = 5
TURN_OUT_S = 2.0
FULL = "this network has no place for another provider now; try again later, or ask its operator"


class Entry:
    """`known` and `banned` ask what attestation knows of a provider id."""

    def __init__(
        self,
        settings: AttestationSettings,
        pool: Pool,
        nc: BusClient,
        issuer: SigningKey,
        clock: Clock,
        randomness: Randomness,
        known: Callable[[str], bool],
        banned: Callable[[str], bool],
    ) -> None:
        self._settings, self._pool, self._nc, self._issuer = settings, pool, nc, issuer
        self._clock, self._randomness = clock, randomness
        self._known, self._banned = known, banned
        self._berths = Berths(settings.berths, int(settings.berth_patience_s * 1000))
        self._taking = asyncio.Lock()
        self._strangers = Bucket(settings.strangers_per_s, settings.strangers_at_once)
        self._addresses = Buckets(
            settings.strangers_per_address_per_s, settings.strangers_per_address, REMEMBERED
        )
        self._logins = Buckets(LOGINS_PER_S, LOGINS_AT_ONCE, REMEMBERED)
        self._questions: asyncio.Queue[Msg] = asyncio.Queue(WAITING)
        self._workers: list[asyncio.Task[None]] = []

    async def load(self) -> None:
        """Read who lives where."""
        self._berths.load(await store.load_berths(self._pool))

    async def open(self) -> None:
        """Answer the server from now on."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(WORKERS)]
        await self._nc.subscribe_direct(permissions.CALLOUT, self._on_question)
        await self._nc.flush()

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    # ---- berths ----

    async def take(self, provider: str) -> int:
        """A provider's berth, given to it now if need be. Raises RateLimited if all are full."""
        async with self._taking:
            for _ in range(TAKE_TRIES):
                mine = self._berths.of(provider)
                if mine is not None:
                    return mine.number
                now_ms = self._clock.now_ms()
                number = self._berths.free(now_ms)
                if number is None:
                    break
                if await store.take_berth(self._pool, number, provider, now_ms):
                    self._berths.put(Berth(number, provider, 0, now_ms))
                    log.info("berth_taken", provider_id=provider)
                else:
                    await self.load()  # another instance wrote meanwhile
        metrics.ENTRIES.inc("full")
        raise RateLimited(FULL, code="too_many_providers", retry_after_s=3600)

    async def _hold(self, provider: str, until_ms: int) -> Berth | None:
        """The provider's berth, kept at least until then; None if it has none."""
        berth = self._berths.of(provider)
        if berth is None:
            return None
        if not await store.hold_berth(self._pool, berth.number, provider, until_ms):
            await self.load()
            return None
        now = self._berths.of(provider) or berth
        held = replace(now, held_until_ms=max(now.held_until_ms, until_ms))
        self._berths.put(held)
        return held

    async def turn_out(self, provider: str) -> int:
        """End the live connections in a provider's berth; how many."""
        berth = self._berths.of(provider)
        if berth is None:
            return 0
        account, ended = accounts.berth(berth.number), 0
        try:
            answer = await self._nc.request(
                f"$SYS.REQ.ACCOUNT.{account}.CONNZ", b"", timeout=TURN_OUT_S
            )
            found = json.loads(answer.data)
            server = found["server"]["id"]
            for connection in found["data"]["connections"]:
                body = json.dumps({"cid": int(connection["cid"])}).encode()
                await self._nc.request(f"$SYS.REQ.SERVER.{server}.KICK", body, timeout=TURN_OUT_S)
                ended += 1
        except (nats.errors.Error, TimeoutError, OSError, KeyError, TypeError, ValueError) as error:
            # its login ends within the hour anyway, and its attestation has ended already
            log.warning("not_turned_out", provider_id=provider, exc_info=error)
        return ended

    # ---- the server's questions ----

    def _on_question(self, message: Msg) -> None:
        try:
            self._questions.put_nowait(message)
        except asyncio.QueueFull:
            metrics.ENTRIES.inc("dropped")

    async def _work(self) -> None:
        while True:
            message = await self._questions.get()
            try:
                answer, outcome = await self._answer(message.data)
            except Exception as error:
                log.exception("entry_failed", exc_info=error)
                answer, outcome = b"", "failed"
            metrics.ENTRIES.inc(outcome)
            if answer:  # without one the server gives up after a while, and the client comes again
                with contextlib.suppress(nats.errors.Error, OSError):
                    await message.respond(answer)

    async def _answer(self, data: bytes) -> tuple[bytes, str]:
        now_s = self._clock.now_ms() // 1000
        try:
            question = read_question(data)
        except ValueError:
            return b"", "malformed"
        try:
            place = await self._place(question)
        except CocoonError as error:
            log.info("entry_refused", code=error.code)
            return refuse(question, error.message, self._issuer, now_s), error.code
        where = "lobby" if place.allowed.account == accounts.LOBBY else "berth"
        return admit(question, place, self._issuer, now_s), where

    async def _place(self, question: Question) -> Place:
        """Where this connection may come in. Raises the tree's errors."""
        provider = provider_id(identity_of(question))
        now_s = self._clock.monotonic_s()
        if not question.encrypted and question.host not in self._settings.plain_from:
            raise Forbidden("it is not encrypted; connect by tls:// or wss://", code="plain_line")
        if not self._logins.take(provider, now_s):
            raise RateLimited("this key logs in too often; wait a minute", code="too_many_logins")
        until_s = self._until_s(self._settings.login_s)
        welcome = self._known(provider) and not self._banned(provider)
        berth = await self._hold(provider, until_s * 1000) if welcome else None
        if berth is not None and not self._banned(provider):  # its ban may have come meanwhile
            allowed = permissions.provider(provider, accounts.berth(berth.number))
            return Place(provider, allowed, until_s)
        if not self._addresses.take(_neighbourhood(question.host), now_s):
            raise RateLimited(
                "too many strangers come from this address; wait a minute",
                code="too_many_from_address",
            )
        if not self._strangers.take(now_s):
            raise RateLimited(
                "too many strangers come in; wait a minute", code="too_many_strangers"
            )
        until_s = self._until_s(self._settings.lobby_s)  # its places are few
        return Place(provider, permissions.stranger(provider), until_s)

    def _until_s(self, longest_s: int) -> int:
        """When a login ends that begins now: not all end at the same time."""
        part = int.from_bytes(self._randomness.token(2), "big") / 65_536
        return self._clock.now_ms() // 1000 + max(1, int(longest_s * (1 - part / 5)))


def _neighbourhood(host: str) -> str:
    """The address that a stranger is counted under."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""  # all that the server names otherwise, together
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.ip_network((int(address), IPV6_PREFIX), strict=False))
