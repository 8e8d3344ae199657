"""From two wildcard subscriptions to the jobs' mailboxes: a dictionary look-up per message.

A mailbox is bounded: frames that do not fit are dropped, and the job reads them from SEALED later.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from pydantic import ValidationError

from cocoon.contracts.messages import DispatchReply, MatchUpdate
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.metrics import FRAMES
from services.gateway.actions import Frame, LogView

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from cocoon.bus.client import BusClient
    from services.gateway.budget import Share

log = get_logger("cocoon.gateway.frames")
HEAD_BYTES: Final = 9  # kind u8, offset u64
LAST_HEAD_BYTES: Final = 41  # and, on the last one, the SHA-256 of the whole response
MAX_FRAME_BYTES: Final = 256 * 1024
DISPATCHED: Final = 2  # the kind of the answer to a dispatch; a DispatchReply follows
MAX_REPLY_BYTES: Final = 256
MAX_ITEMS: Final = 8192
MAX_FRAMES, MAX_THEIRS = MAX_ITEMS // 2, MAX_ITEMS * 3 // 4  # a provider's; the rest is our own
_DISPATCHED: Final = bytes((DISPATCHED,))


class Tick(NamedTuple):
    """The job's timer has run out."""


class Gone(NamedTuple):
    """The client has closed its connection."""


class DispatchAnswer(NamedTuple):
    epoch: int
    outcome: Literal["accepted", "busy", "refused", "silent"]
    code: str


Item: TypeAlias = Frame | MatchUpdate | LogView | Tick | Gone | DispatchAnswer


def parse_frame(provider_id: str, epoch: int, body: bytes) -> Frame | None:
    """A frame's message, or None if it is malformed."""
    if len(body) < HEAD_BYTES or len(body) > MAX_FRAME_BYTES + LAST_HEAD_BYTES:
        return None
    offset = int.from_bytes(body[1:HEAD_BYTES], "big")
    if body[0] == 0:
        return Frame(provider_id, epoch, offset, body[HEAD_BYTES:])
    if body[0] != 1 or len(body) < LAST_HEAD_BYTES:
        return None
    data = body[LAST_HEAD_BYTES:]
    return Frame(
        provider_id, epoch, offset, data, last=True, total=offset + len(data),
        blob_hash=body[HEAD_BYTES:LAST_HEAD_BYTES],
    )  # fmt: skip


def parse_reply(epoch: int, body: bytes) -> DispatchAnswer | None:
    """A provider's answer to a dispatch, or None if it is malformed."""
    if len(body) > MAX_REPLY_BYTES:
        return None
    try:
        reply = DispatchReply.model_validate_json(body[1:])
    except ValidationError:
        return None
    if reply.accepted:
        return DispatchAnswer(epoch, "accepted", "none")
    return DispatchAnswer(epoch, "busy" if reply.code == "busy" else "refused", reply.code)


class Mailbox:
    """What waits for one job: updates, bounded frames, timers. One reader."""

    __slots__ = (
        "_items", "_limit", "_share", "_waiter", "awaited_until_s", "gone", "live", "owner",
        "waiting_bytes",
    )  # fmt: skip

    def __init__(self, limit_bytes: int, owner: tuple[str, str], share: Share) -> None:
        self.live: tuple[str, str] | None = None  # provider and epoch whose frames are taken
        self.gone = False
        self.awaited_until_s = math.inf  # loop time; finite once its client has left
        self.owner = owner  # account and req_hash
        self._limit = limit_bytes
        self._share = share  # of the gateway's memory; the job's run gives back what it has sent
        self._items: deque[Item] = deque()
        self.waiting_bytes = 0
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        if len(self._items) < MAX_ITEMS:
            self._items.append(item)
            self._wake()

    def put_frame(self, frame: Frame) -> None:
        """Queue a frame; over the bound a last frame leaves its end and the others nothing."""
        size = len(frame.data)
        if (
            self.waiting_bytes + size > self._limit
            or len(self._items) >= MAX_FRAMES
            or not self._share.take(size)
        ):
            FRAMES.inc("gap")
            if not frame.last or len(self._items) >= MAX_THEIRS:
                return
            frame, size = frame._replace(data=b""), 0
        self.waiting_bytes += size
        self.put(frame)

    def put_answer(self, answer: DispatchAnswer) -> None:
        """Queue a provider's answer; it counts once, whoever repeats it fills no more than this."""
        if len(self._items) < MAX_THEIRS:
            self.put(answer)

    def client_gone(self) -> None:
        self.gone = True
        self.awaited_until_s = 0.0
        self._items.append(Gone())
        self._wake()

    def drop_frames(self) -> None:
        """Take no more frames, and let those go that wait."""
        self.live = None
        self._items = deque(item for item in self._items if not isinstance(item, Frame))
        self.waiting_bytes = 0

    async def take(self) -> list[Item]:
        """Everything that waits, at least one item."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        self.waiting_bytes = 0
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Switchboard:
    """The mailboxes of the jobs at this gateway; a repeat of a running job has its own."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._boxes: dict[str, tuple[Mailbox, ...]] = {}

    async def listen(self, nc: BusClient) -> None:
        """Open the two subscriptions that serve every job."""
        await nc.subscribe_direct(f"tok.{self._gateway_id}.>", self.on_frame)
        await nc.subscribe_direct(f"mat.{self._gateway_id}.*", self.on_update)
        await nc.flush()

    def owner_of(self, job_id: str) -> tuple[str, str] | None:
        """Account and req_hash of a job that runs here, or None."""
        boxes = self._boxes.get(job_id)
        return boxes[0].owner if boxes else None

    def awaited_until_s(self, job_id: str, but: Mailbox | None = None) -> float:
        """Loop time until which a client of this gateway waits for the job, or may come back.

        Infinite while one is there; one that has left counts for its own grace only.
        """
        boxes = self._boxes.get(job_id, ())
        return max((box.awaited_until_s for box in boxes if box is not but), default=0.0)

    def add(self, job_id: str, box: Mailbox) -> None:
        self._boxes[job_id] = (*self._boxes.get(job_id, ()), box)

    def remove(self, job_id: str, box: Mailbox) -> None:
        left = tuple(b for b in self._boxes.get(job_id, ()) if b is not box)
        if left:
            self._boxes[job_id] = left
        else:
            self._boxes.pop(job_id, None)

    def on_frame(self, message: Msg) -> None:
        """`tok.<gateway>.<provider>.<job>.<epoch>`; the server vouches for the provider's name."""
        words = message.subject.split(".")
        boxes = self._boxes.get(words[3]) if len(words) == 5 else None
        if boxes is None:
            FRAMES.inc("stale")
            return
        live = (words[2], words[4])
        if message.data[:1] == _DISPATCHED:
            answer = parse_reply(int(words[4]), message.data) if words[4].isdigit() else None
            for box in boxes:
                if answer is not None and box.live == live:
                    box.put_answer(answer)
            return
        frame: Frame | None = None
        for box in boxes:
            if box.live != live:
                FRAMES.inc("stale")
                continue
            frame = frame or parse_frame(words[2], int(words[4]), message.data)
            if frame is None:
                FRAMES.inc("stale")
                return
            box.put_frame(frame)

    def on_update(self, message: Msg) -> None:
        """`mat.<gateway>.<job>`."""
        boxes = self._boxes.get(message.subject.rpartition(".")[2])
        if boxes is None:
            return
        try:
            update = MatchUpdate.model_validate_json(message.data)
        except ValidationError:
            log.exception("bad_match_update")
            return
        for box in boxes:
            box.put(update)
