"""Key epochs: child processes with one X25519 key each, and what the agent may ask of them.

Each key belongs to the evidence under which it was announced, for as long as it lives. The agent
never sees a secret, only single jobs' exports.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Final, cast

from cocoon.kernel.errors import SealingError, Unavailable
from cocoon.sealing import JobExports, key_id
from services.provider.keyholder import ANSWER, CODES, PUBLIC_KEY_BYTES, QUESTION

START_TIMEOUT_S: Final = 20.0
ANSWER_TIMEOUT_S: Final = 2.0
MAX_QUESTIONS: Final = 4096
MAX_EPOCHS: Final = 4


class KeyProcess(asyncio.Protocol):
    """One running key holder. `ask` costs one round trip on a local socket."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self._process = process
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: dict[int, tuple[asyncio.Future[JobExports], asyncio.TimerHandle]] = {}
        self._number = 0
        self._public: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"KeyProcess({self._process.pid})"

    @classmethod
    async def start(cls, lifetime_ms: int) -> tuple[KeyProcess, bytes]:
        """Start a holder for a new key and return it with the public half.

        Raises Unavailable if the process does not come up.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # on this thread: a few milliseconds each ten minutes, and nothing to lose track of
            process = _spawn(theirs, lifetime_ms)
        self = cls(process, ours)
        try:
            ours.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self, ours)
            async with asyncio.timeout(START_TIMEOUT_S):
                return self, await self._public
        except BaseException as error:
            self.end()
            if not isinstance(error, TimeoutError | ConnectionError):
                raise
            raise Unavailable("the key holder's process did not start; is memory short?") from None

    @property
    def lives(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(
        self, key: bytes, enc: bytes, fixed_header: bytes, eph_sk: bytes
    ) -> asyncio.Future[JobExports]:
        """Ask for one job's exports. It, or its answer, raises SealingError (unknown_key, bad_key,
        busy).
        """
        if self._transport is None or self._transport.is_closing():
            raise SealingError("This enclave no longer holds that key.", code="unknown_key")
        if len(self._waiting) >= MAX_QUESTIONS:
            raise SealingError("The enclave is answering as many requests as it can.", code="busy")
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        loop = asyncio.get_running_loop()
        future: asyncio.Future[JobExports] = loop.create_future()
        timer = loop.call_later(ANSWER_TIMEOUT_S, self._give_up, number)
        self._waiting[number] = future, timer
        self._transport.write(QUESTION.pack(number, key, enc, fixed_header, eph_sk))
        return future

    def _give_up(self, number: int) -> None:
        self._settle(number, SealingError("The key holder did not answer in time.", code="busy"))

    def _settle(self, number: int, answer: JobExports | SealingError) -> None:
        future, timer = self._waiting.pop(number, (None, None))
        if future is None or timer is None:
            return
        timer.cancel()
        if future.done():
            return
        if isinstance(answer, SealingError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def end(self) -> None:
        """Erase the key: hang up and kill the process, which has nothing to tidy up."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._link.close()
        self._process.kill()
        self._process.wait()  # a killed process is gone within a moment

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a stream socket's transport; uvloop's does not inherit from asyncio's
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._public.done():
            if len(self._buffer) < PUBLIC_KEY_BYTES:
                return
            self._public.set_result(bytes(self._buffer[:PUBLIC_KEY_BYTES]))
            del self._buffer[:PUBLIC_KEY_BYTES]
        while len(self._buffer) >= ANSWER.size:
            number, code, exports = ANSWER.unpack_from(self._buffer)
            del self._buffer[: ANSWER.size]
            if code:
                error = SealingError("The key holder refused this job's key.", code=CODES[code])
                self._settle(number, error)
            else:
                self._settle(number, JobExports(exports[:32], exports[32:64], exports[64:]))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._public.done():
            self._public.set_exception(ConnectionError("the key holder ended"))
        error = SealingError("This enclave no longer holds that key.", code="unknown_key")
        for number in tuple(self._waiting):
            self._settle(number, error)


def _spawn(theirs: socket.socket, lifetime_ms: int) -> subprocess.Popen[bytes]:
    number = theirs.fileno()
    command = [sys.executable, "-m", "services.provider.keyholder", str(number), str(lifetime_ms)]
    # its stderr could only ever be a traceback, which belongs in no log of ours
    return subprocess.Popen(
        command, pass_fds=(number,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass(slots=True)
class Epoch:
    """One held key: whose evidence announced it (None until then) and how long it lives."""

    process: KeyProcess
    public_key: bytes
    number: int
    not_before_ms: int
    not_after_ms: int
    evidence_id: bytes | None = None

    @property
    def key_id(self) -> bytes:
        return key_id(self.public_key)


class KeyEpochs:
    """The keys held now. One is made before the last one's time is over; each ends on time."""

    def __init__(self, *, epoch_ms: int, overlap_ms: int) -> None:
        if not 0 < overlap_ms < (MAX_EPOCHS - 2) * epoch_ms:
            raise ValueError("the overlap is shorter than two epochs")
        self._epoch_ms = epoch_ms
        self._overlap_ms = overlap_ms
        self._held: dict[bytes, Epoch] = {}
        self._number = 0

    async def make(self, now_ms: int) -> Epoch:
        """Start a new key's process. It serves once it is bound to evidence.

        Raises Unavailable if the process does not start or too many keys are held.
        """
        self.prune(now_ms)
        if len(self._held) >= MAX_EPOCHS:
            raise Unavailable("too many key epochs are held; the last ones were not announced")
        lifetime_ms = self._epoch_ms + self._overlap_ms
        process, public_key = await KeyProcess.start(lifetime_ms)
        self._number += 1
        epoch = Epoch(process, public_key, self._number, now_ms, now_ms + lifetime_ms)
        self._held[epoch.key_id] = epoch
        return epoch

    def get(self, key: bytes) -> Epoch | None:
        epoch = self._held.get(key)
        return epoch if epoch is not None and epoch.evidence_id is not None else None

    def holds(self, epoch: Epoch) -> bool:
        """Whether this key still serves: it was not erased, and its process lives."""
        return self._held.get(epoch.key_id) is epoch and epoch.process.lives

    def key_ids(self) -> frozenset[bytes]:
        """Keys that were announced and still live."""
        return frozenset(key for key, epoch in self._held.items() if epoch.evidence_id is not None)

    def next_due_ms(self, epoch: Epoch) -> int:
        """When the key after this one must be announced: an overlap before this one's end."""
        return epoch.not_before_ms + self._epoch_ms

    def drop(self, epoch: Epoch) -> None:
        """Erase a key that could not be announced."""
        self._held.pop(epoch.key_id, None)
        epoch.process.end()

    def prune(self, now_ms: int) -> None:
        """Erase the keys whose time is over; running streams keep their jobs' own keys."""
        ended = [epoch for epoch in self._held.values() if epoch.not_after_ms <= now_ms]
        for epoch in ended:
            self.drop(epoch)

    def close(self) -> None:
        for epoch in tuple(self._held.values()):
            self.drop(epoch)
