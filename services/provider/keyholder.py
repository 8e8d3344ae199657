"""A child process that holds one epoch's X25519 secret, answers for single jobs, and dies with it.

Ending the process is how the key is erased: Python cannot wipe its own memory. The secret never
leaves; the parent asks over one socket in fixed-size messages. No core dumps, no tracing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import struct
import sys
import time
from typing import Final

from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import SealingError
from cocoon.sealing.envelope import FIXED_BYTES
from cocoon.sealing.keys import KeyRing

# number, key_id, enc, fixed header, the response's ephemeral secret
QUESTION: Final = struct.Struct(f">I16s32s{FIXED_BYTES}s32s")
# number, code, wrap key || response export || ephemeral DH
ANSWER: Final = struct.Struct(">IB96s")
PUBLIC_KEY_BYTES: Final = 32
CODES: Final = ("ok", "unknown_key", "bad_key")
_PR_SET_DUMPABLE: Final = 4


def harden() -> None:
    """No core dump holds the key and no debugger of the same user reads it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def answer(ring: KeyRing, question: bytes) -> bytes:
    """Answer one question. Never raises for what a question holds."""
    number, key_id, enc, fixed_header, resp_eph_sk = QUESTION.unpack(question)
    try:
        exports = ring.job_exports(key_id, enc, fixed_header, resp_eph_sk)
    except SealingError as error:
        return ANSWER.pack(number, CODES.index(error.code), bytes(96))
    return ANSWER.pack(number, 0, b"".join(exports))


def serve(link: socket.socket, ring: KeyRing, until_monotonic_s: float) -> None:
    """Answer until the parent hangs up or the epoch is over."""
    pending = bytearray()
    size = QUESTION.size
    while (left_s := until_monotonic_s - time.monotonic()) > 0:
        link.settimeout(left_s)
        try:
            data = link.recv(64 * size)
        except TimeoutError:
            return
        if not data:
            return
        pending += data
        whole = len(pending) // size * size
        answers = [answer(ring, bytes(pending[at : at + size])) for at in range(0, whole, size)]
        del pending[:whole]
        if answers:
            link.sendall(b"".join(answers))


def main() -> None:
    """Make a key, tell its public half on the socket argv[1], serve for argv[2] milliseconds."""
    harden()
    number, lifetime_ms = int(sys.argv[1]), int(sys.argv[2])
    until_s = time.monotonic() + lifetime_ms / 1000
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # running jobs drain; the parent ends us
    ring = KeyRing()
    with socket.socket(fileno=number) as link:
        try:
            link.sendall(ring.generate(SystemRandomness()))
            serve(link, ring, until_s)
        except (BrokenPipeError, ConnectionResetError):
            pass
    os._exit(0)  # nothing runs after the key's end


if __name__ == "__main__":
    main()
