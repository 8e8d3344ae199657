"""What the spool has said is kept is on disk: kill -9, a power cut, a second agent, a mute bus."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from nacl.signing import SigningKey

from cocoon.contracts.messages import ResultAck
from cocoon.kernel.clock import SystemClock
from services.provider import journal, submitting
from services.provider.spool import SEGMENT_S
from services.provider.submitting import Submitter
from tests.support.spool_world import RESPONSE, files, head, jobs, spool

if TYPE_CHECKING:
    from nats.js import JetStreamContext


def test_a_new_folder_outlives_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))
    )
    spool(tmp_path / "data" / "spool")
    assert synced == [str(tmp_path / "data"), str(tmp_path)]
    spool(tmp_path / "data" / "spool")
    assert len(synced) == 2


async def test_a_move_that_kill_9_cut_off_is_on_disk_before_its_source_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the write of a moved copy and its sync; another start; then a power cut."""
    made = spool(tmp_path / "s", max_items=8)
    for number in range(1, 5):
        await made.write(head(number), RESPONSE)
    for item in [item for item in made if item.head.job_id != head(1).job_id]:
        made.remove(item)
    for now_s in (0.0, SEGMENT_S, SEGMENT_S):  # the segment is closed, and seen to be
        await made.tidy(now_s)
    synced = {path.name for path in files(tmp_path / "s")}

    class Killed(BaseException):
        pass

    def killed(_: int) -> None:
        raise Killed

    monkeypatch.setattr(os, "fdatasync", killed)
    monkeypatch.setattr(journal.Journal, "_undo", lambda *_: None)  # who was killed undoes nothing
    with pytest.raises((Killed, OSError)):
        await made.tidy(SEGMENT_S * 2 + 1)
    monkeypatch.undo()

    def noting(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            sync(descriptor)

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync))
    (item,) = spool(tmp_path / "s", max_items=8)
    assert item.segment.path.name in synced


async def test_a_segment_whose_close_failed_is_not_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spool(tmp_path / "s")
    await made.write(head(1), RESPONSE)
    close = os.close

    def failing(descriptor: int) -> None:
        close(descriptor)  # Linux gives the number back, whatever it says
        raise OSError(errno.EIO, "close")

    monkeypatch.setattr(os, "close", failing)
    await made.tidy(0.0)
    with pytest.raises(OSError, match="close"):
        await made.tidy(SEGMENT_S)
    monkeypatch.undo()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)  # takes the number
    await made.write(head(2), RESPONSE)
    assert os.pread(other, 1, 0) == b""
    os.close(other)
    assert jobs(spool(tmp_path / "s")) == [1, 2]


async def test_what_was_acknowledged_leaves_the_disk_while_others_are_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"max_items": 100, "max_bytes": 10_000_000}
    first = spool(tmp_path / "s", **room)
    for number in range(1, 41):
        await first.write(head(number), RESPONSE)
    made = spool(tmp_path / "s", **room)
    js, identity = cast("JetStreamContext", None), SigningKey.generate()
    submitter = Submitter(js, made, identity, "p", SystemClock(), first_backoff_s=60.0)
    submitter.adopt()
    submitted = asyncio.Event()

    async def without_end(*_: object) -> str:
        submitted.set()
        await asyncio.sleep(3600)
        return ""

    monkeypatch.setattr(submitting, "put_sealed", without_end)
    running = asyncio.create_task(submitter.run())
    await submitted.wait()
    for number in range(1, 41):
        name = head(number).job_id
        submitter.acknowledge(ResultAck(job_id=name, epoch=1, outcome="result_sealed"))
    async with asyncio.timeout(10):
        while files(tmp_path / "s"):  # noqa: ASYNC110 - the sweep's time
            await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_second_agent_is_turned_away_from_the_folder(tmp_path: Path) -> None:
    spool(tmp_path / "s")
    second = (
        "import pathlib, sys; from services.provider.spool import Spool;"
        "Spool(pathlib.Path(sys.argv[1]), 3, 80_000).open()"
    )
    done = subprocess.run(
        [sys.executable, "-c", second, tmp_path / "s"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "another agent works in" in done.stderr
