"""Makers of a gateway job's inputs, and readers of its actions."""

from __future__ import annotations

import hashlib

from cocoon.kernel.errors import CocoonError
from services.gateway.actions import (
    Action,
    Fail,
    Frame,
    Match,
    Send,
    Timing,
)  # fmt: skip
from services.gateway.decide import Relay

RESPONSE = bytes(range(256)) * 3
BLOB = hashlib.sha256(RESPONSE).digest()
TIMING = Timing()


def match(epoch: int = 1, provider: str = "prov_a") -> Match:
    return Match(epoch, provider, "{}", "q" * 64, "e" * 64)


def relay(
    *, stream: bool = True, attached: bool = False, buffer_limit: int = 1 << 20,
    not_after_in_ms: int = 60_000,
) -> Relay:  # fmt: skip
    return Relay(
        stream=stream, attached=attached, timing=TIMING, buffer_limit=buffer_limit,
        not_after_in_ms=not_after_in_ms, now_ms=0,
    )  # fmt: skip


def frame(start: int, end: int, epoch: int = 1, provider: str = "prov_a") -> Frame:
    return Frame(provider, epoch, start, RESPONSE[start:end])


def last(start: int, epoch: int = 1, provider: str = "prov_a") -> Frame:
    return Frame(provider, epoch, start, RESPONSE[start:], True, len(RESPONSE), BLOB)


def sent(actions: list[Action]) -> bytes:
    return b"".join(a.data for a in actions if isinstance(a, Send))


def kinds(actions: list[Action]) -> list[str]:
    return [type(a).__name__ for a in actions]


def matched_and_committed(machine: Relay) -> None:
    machine.begin()
    machine.on_matched(match(), 0)
    machine.on_committed(1)


def failure(actions: list[Action]) -> CocoonError:
    fails = [a for a in actions if isinstance(a, Fail)]
    assert len(fails) == 1
    return fails[0].error
