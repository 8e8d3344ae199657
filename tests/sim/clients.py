"""Clients of the simulated network: they seal to a directory's keys, ask a gateway, repeat with the
same key after a broken answer, go away, read slowly; and what each of them saw.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cocoon.kernel.errors import CocoonError
from cocoon.sealing import Profile
from cocoon.sealing.envelope import RecipientSlot, RequestHeader, pack_flags
from services.gateway.handlers import RunJob
from services.gateway.store import ApiKey
from tests.sim.providers import envelope_of
from tests.support.collected import ClientCall
from tests.support.job_world import MODEL, POLICY, bytes32

if TYPE_CHECKING:
    from tests.sim.platform import Door
    from tests.sim.world import World

PLAIN, STREAM = (pack_flags(Profile.P3, stream=stream) for stream in (False, True))
MAX_TRIES = 4


@dataclass
class Wish:
    """One request of one client, whatever many times it is sent."""

    number: int
    account: str
    key: str  # Idempotency-Key, may be empty
    envelope: bytes
    header: RequestHeader
    tries: int = 0

    @property
    def job_id(self) -> str:
        return self.header.job_id.hex()


@dataclass(eq=False)
class Answer:
    """An HTTP answer as the client reads it (services.gateway.handlers.JobResponse)."""

    world: World
    wish: Wish
    call: int  # its place among the world's calls
    body: bytearray = field(default_factory=bytearray)
    started: bool = False
    whole: bool = False
    slow: bool = False
    gone: Callable[[], None] | None = None
    epoch: int = 0

    async def start(self, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
        self.started = True
        self.epoch = int(dict(headers)[b"x-cocoon-epoch"])
        self._tell()

    async def send_within(self, data: bytes, timeout_s: float, *, last: bool = False) -> bool:
        if self.slow or self.world.faults.happens("slow_reader"):
            self.slow = True  # from now on: what it does not take now, it never takes
            await asyncio.sleep(timeout_s)
            return False
        self.body += data
        self.whole = self.whole or last
        self._tell()
        return True

    async def finish(self) -> None:
        if not self.slow:
            self.whole = True
            self._tell()

    def watch(self, on_gone: Callable[[], None]) -> asyncio.Task[None]:
        self.gone = on_gone
        return asyncio.create_task(asyncio.sleep(0))

    def _tell(self) -> None:
        digest = hashlib.sha256(self.body).hexdigest() if self.whole else None
        if digest in self.world.forged:
            digest = None  # the client checks the receipt and refuses the answer
        self.world.saw(
            self.call,
            ClientCall(
                self.wish.account, self.wish.key, self.wish.job_id, 200, len(self.body), digest,
                self.epoch,
            ),
        )  # fmt: skip


class Clients:
    """Everybody who asks."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random
        self.wishes: list[Wish] = []
        self.open: dict[int, tuple[Wish, Door, Answer]] = {}
        self.outcomes: dict[str, int] = {}

    def ask_something(self) -> None:
        """A new request, or an old one again, or another request under an old key."""
        source = self.random
        draw = source.random()
        if self.wishes and draw < 0.08:
            self.send(source.choice(self.wishes[-20:]))
            return
        old = source.choice(self.wishes[-20:]) if self.wishes and draw < 0.11 else None
        wish = self._wish(old)
        if wish is not None:
            self.wishes.append(wish)
            self.send(wish)

    def _wish(self, old: Wish | None) -> Wish | None:
        world, source = self.world, self.random
        keys = [agent.enclave.key_id for agent in world.agents if agent.enclave is not None]
        if not keys:
            return None
        number = len(self.wishes)
        chosen = source.sample(keys, min(len(keys), source.choice((1, 2, 3, 3))))
        header = RequestHeader(
            bytes32(f"{world.seed} job {number}")[:16], bytes.fromhex(MODEL),
            source.choice((6_000, 6_000, 6_000, 6_000, 9_000, 9_000, 4_000)), 1000, 1000,
            world.clock.now_ms() + source.choice((60_000, 60_000, 8_000)),
            bytes.fromhex(POLICY), source.choice((PLAIN, STREAM)),
            tuple(RecipientSlot(bytes.fromhex(key), bytes32(key), b"") for key in chosen),
        )  # fmt: skip
        account = old.account if old else source.choice(world.accounts)
        key = old.key if old else source.choice(("", f"key {number}"))
        return Wish(number, account, key, envelope_of(header, f"{number}"), header)

    def send(self, wish: Wish) -> None:
        door = self.world.open_door()
        if door is None:
            return
        wish.tries += 1
        call = self.world.new_call()
        answer = Answer(self.world, wish, call)
        self.open[call] = (wish, door, answer)
        self.world.loop.run_as(door.process, self._run, wish, door, answer)
        if self.world.faults.happens("disconnect", 4):
            delay_s = self.random.uniform(0.0, 4.0)
            self.world.loop.at(delay_s, "client", self._leave, answer, process=door.process)

    def _leave(self, answer: Answer) -> None:
        if answer.call in self.open and answer.gone is not None:
            answer.gone()

    def _run(self, wish: Wish, door: Door, answer: Answer) -> None:
        asyncio.create_task(self._ask(wish, door, answer))  # noqa: RUF006

    async def _ask(self, wish: Wish, door: Door, answer: Answer) -> None:
        request = RunJob(
            ApiKey(f"key_{wish.account}", wish.account), wish.header, wish.envelope,
            hashlib.sha256(wish.envelope).hexdigest(), wish.key, "",
        )  # fmt: skip
        try:
            with door.gateway.admission.enter(request.key.api_key_id) as slot:
                await door.gateway.do_run_job(request, answer, slot)
            outcome = "whole" if answer.whole else "truncated"
        except CocoonError as error:
            outcome = error.code
            if not answer.started:
                self.world.saw(
                    answer.call,
                    ClientCall(wish.account, wish.key, wish.job_id, error.http_status, 0),
                )
        self._ended(answer, outcome)

    def _ended(self, answer: Answer, outcome: str) -> None:
        if self.open.pop(answer.call, None) is None:
            return
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        wish = answer.wish
        broken = outcome in ("truncated", "reset", "job_failed", "provider_lost", "response_lost")
        if broken and wish.tries < MAX_TRIES and self.random.random() < 0.6:
            delay_s = self.random.uniform(0.01, 3.0)
            self.world.loop.at(delay_s, "client", self.send, wish)

    def reset(self, door: Door) -> None:
        """The gateway died: every connection to it breaks."""
        for _, at, answer in list(self.open.values()):
            if at is door:
                self._ended(answer, "reset")
