"""A job's mailbox: what a provider sends leaves room for what the gateway tells itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nats.aio.msg import Msg

from cocoon.contracts.messages import DispatchReply
from services.gateway.budget import ByteBudget
from services.gateway.frames import DISPATCHED, MAX_ITEMS, Mailbox, Switchboard, Tick

PROVIDER, JOB = "prov_1", "ab" * 16
TAKEN = bytes((DISPATCHED,)) + DispatchReply(accepted=True).to_canonical()
LAST = b"\x01" + bytes(8) + bytes(32)  # without a byte of data
MORE = b"\x00" + bytes(8)


def world() -> tuple[Switchboard, Mailbox]:
    board = Switchboard("gw_1")
    box = Mailbox(1024, ("acc", "hash"), ByteBudget(4096, 4096).share("key"))
    box.live = (PROVIDER, "1")
    board.add(JOB, box)
    return board, box


def said(data: bytes, provider: str = PROVIDER, job: str = JOB, epoch: str = "1") -> Msg:
    client: Any = None
    return Msg(client, f"tok.gw_1.{provider}.{job}.{epoch}", "", data)


@pytest.mark.parametrize("flood", [TAKEN, LAST, MORE])
async def test_a_provider_that_floods_its_job_cannot_keep_the_jobs_timer_out(flood: bytes) -> None:
    """A timer that is not heard of is never set again: the job would wait for ever."""
    board, box = world()
    for _ in range(2 * MAX_ITEMS):
        board.on_frame(said(flood))
    box.put(Tick())
    async with asyncio.timeout(5):
        assert (await box.take())[-1] == Tick()


@pytest.mark.parametrize("kind", [TAKEN, LAST])
@pytest.mark.parametrize(
    "other", [{"provider": "prov_2"}, {"epoch": "2"}, {"epoch": "01"}, {"job": "cd" * 16}]
)
async def test_only_the_live_match_s_provider_is_heard_for_its_job_and_epoch(
    kind: bytes, other: dict[str, str]
) -> None:
    board, box = world()
    board.on_frame(said(kind, **other))
    box.put(Tick())
    assert await box.take() == [Tick()]
