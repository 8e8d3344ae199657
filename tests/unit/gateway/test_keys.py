"""Keys in memory: one in use is renewed before its time is over, and guesses do not hinder it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import Unauthenticated, Unavailable
from services.gateway import keys, store
from services.gateway.keys import KeyRing
from services.gateway.store import ApiKey

TTL_S = 30.0
KEY = ApiKey("key_a1", "acct_1")


class Database:
    """The table of keys: who is live, who asked, and whether it answers at all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.live = {_hash(_text("live")): KEY}
        self.asked: list[bytes] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.fails = False
        monkeypatch.setattr(store, "find_key", self._find)
        self.ring = KeyRing(cast(Any, None), cast(Any, None), cast(Clock, self), TTL_S)
        self.ring.on_state(True)

    def monotonic_s(self) -> float:
        return self.now_s

    async def _find(self, _pool: object, secret_hash: bytes) -> ApiKey | None:
        self.asked.append(secret_hash)
        await self.answers.wait()
        if self.fails:
            raise Unavailable("away")
        return self.live.get(secret_hash)

    async def use(self, name: str = "live") -> ApiKey:
        return await self.ring.authenticate(b"Bearer " + _text(name))


def _text(name: str) -> bytes:
    return b"ck_" + name.encode().rjust(43, b"A")


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _with_database(
    monkeypatch: pytest.MonkeyPatch, test: Callable[[Database], Awaitable[None]]
) -> None:
    async def run() -> None:
        database = Database(monkeypatch)
        await test(database)
        await database.ring.close()

    asyncio.run(run())


async def _guess(database: Database) -> list[asyncio.Task[ApiKey]]:
    """As many guesses as are looked up at once, none of them answered."""
    database.answers.clear()
    guesses = [
        asyncio.create_task(database.use(f"guess{number}")) for number in range(keys.MAX_LOOKUPS)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await database.use("another")
    return guesses


async def _end(database: Database, guesses: list[asyncio.Task[ApiKey]]) -> None:
    database.answers.set()
    ends = await asyncio.gather(*guesses, return_exceptions=True)
    assert all(isinstance(end, Unauthenticated) for end in ends)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_live_key_is_served_and_renewed_while_guesses_fill_the_look_ups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(database: Database) -> None:
        assert await database.use() == KEY
        guesses = await _guess(database)
        database.now_s += TTL_S * 0.8
        asked = len(database.asked)
        for _ in range(3):
            assert await database.use() == KEY  # although nobody answers
        await _settle()
        assert len(database.asked) == asked + 1
        await _end(database, guesses)
        await _settle()
        database.now_s += TTL_S * 0.3  # beyond its first time
        assert await database.use() == KEY
        assert len(database.asked) == asked + 1

    _with_database(monkeypatch, test)


def test_a_key_that_was_live_is_looked_up_although_guesses_fill_the_look_ups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(database: Database) -> None:
        assert await database.use() == KEY
        guesses = await _guess(database)
        database.now_s += TTL_S + 1
        again = asyncio.create_task(database.use())
        await _settle()
        assert not again.done()  # its time is over: only the table says whether it still lives
        await _end(database, guesses)
        assert await again == KEY

    _with_database(monkeypatch, test)


def test_a_key_that_cannot_be_renewed_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(database: Database) -> None:
        assert await database.use() == KEY
        database.fails = True
        database.now_s += TTL_S - 1
        assert await database.use() == KEY
        await _settle()
        assert await database.use() == KEY
        database.now_s += 1
        with pytest.raises(Unavailable):
            await database.use()

    _with_database(monkeypatch, test)


def test_a_renewal_that_finds_a_key_revoked_ends_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(database: Database) -> None:
        assert await database.use() == KEY
        database.live.clear()  # and nobody told
        database.now_s += TTL_S * 0.6
        assert await database.use() == KEY
        await _settle()
        with pytest.raises(Unauthenticated):
            await database.use()

    _with_database(monkeypatch, test)


def test_a_renewal_that_began_before_a_revocation_brings_no_key_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(database: Database) -> None:
        assert await database.use() == KEY
        database.answers.clear()
        database.now_s += TTL_S * 0.6
        assert await database.use() == KEY
        await _settle()
        database.ring.on_change(_hash(_text("live")))
        database.answers.set()  # with what the table said before
        await _settle()
        database.live.clear()
        with pytest.raises(Unauthenticated):
            await database.use()

    _with_database(monkeypatch, test)
