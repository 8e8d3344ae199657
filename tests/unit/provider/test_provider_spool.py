"""The spool keeps sealed results through a crash and never keeps a damaged one."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

import pytest
from nacl.signing import SigningKey

from cocoon.contracts.messages import ResultAck
from cocoon.kernel import canonical
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import ConfigurationError
from services.provider.journal import Segment, SpoolHead
from services.provider.spool import SEGMENT_S, Spool
from services.provider.submitting import Submitter
from tests.support.small_disk import fill, small_disk
from tests.support.spool_world import RESPONSE, WRITTEN_BYTES, files, head, jobs, spool

if TYPE_CHECKING:
    from nats.js import JetStreamContext


async def test_a_written_result_is_there_after_a_restart(tmp_path: Path) -> None:
    first = spool(tmp_path / "s")
    await first.write(head(), RESPONSE)
    again = spool(tmp_path / "s")
    (item,) = again
    assert item.head == head()
    assert item.read() == RESPONSE
    assert again.of_job(head().job_id) is item
    again.remove(item)
    again.remove(item)
    assert len(again) == 0
    await again.close()
    assert len(spool(tmp_path / "s")) == 0


async def test_an_acknowledged_result_stays_forgotten_though_its_file_stays(tmp_path: Path) -> None:
    made = spool(tmp_path)
    item = await made.write(head(1), RESPONSE)
    await made.write(head(2), RESPONSE)
    made.remove(item)
    await made.tidy(0.0)
    assert len(files(tmp_path)) == 1
    assert jobs(spool(tmp_path)) == [2]


async def test_results_that_wait_together_share_one_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spool(tmp_path, max_items=100, max_bytes=2**20)
    syncs: list[int] = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), sync(fd)))
    items = await asyncio.gather(*(made.write(head(job), RESPONSE) for job in range(50)))
    assert [item.read() for item in items] == [RESPONSE] * 50
    assert len(syncs) == 1
    assert len(made) == 50
    assert jobs(spool(tmp_path, max_items=100)) == list(range(50))


async def test_a_result_is_counted_though_who_wrote_it_is_gone(tmp_path: Path) -> None:
    made = spool(tmp_path)
    writing = asyncio.create_task(made.write(head(1), RESPONSE))
    await asyncio.sleep(0)
    writing.cancel()
    await made.write(head(2), RESPONSE)
    assert jobs(made) == [1, 2]


async def test_the_newest_epoch_of_a_job_answers_a_repeat(tmp_path: Path) -> None:
    made = spool(tmp_path)
    for epoch in (1, 3, 2):
        await made.write(head(epoch=epoch), RESPONSE)
    item = made.of_job(head().job_id)
    assert item is not None
    assert item.head.epoch == 3
    assert len(made) == 3
    made.remove(item)
    left = made.of_job(head().job_id)
    assert left is not None
    assert left.head.epoch == 2


async def test_other_and_damaged_files_are_removed(tmp_path: Path) -> None:
    made = spool(tmp_path)
    await made.write(head(1), RESPONSE)
    (whole,) = files(tmp_path)
    (tmp_path / "x.partial").write_bytes(b"half")
    (tmp_path / "y.journal").write_bytes(b"")
    (tmp_path / "00000002.journal").write_bytes(b"")
    (tmp_path / "00000003.journal").write_bytes(whole.read_bytes()[:-1])
    assert jobs(spool(tmp_path)) == [1]
    assert files(tmp_path) == [whole]


async def test_a_response_that_is_damaged_later_is_not_given_out(tmp_path: Path) -> None:
    made = spool(tmp_path)
    item = await made.write(head(), RESPONSE)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="hash"):
        item.read()


async def test_a_full_spool_says_so(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=2)
    assert made.has_room()
    for job in (1, 2):
        await made.write(head(job), RESPONSE)
    assert not made.has_room()
    made.remove(next(iter(made)))
    assert made.has_room()
    assert not spool(tmp_path, max_bytes=2 * WRITTEN_BYTES).has_room()


async def test_bytes_that_nobody_needs_any_more_count_until_they_are_gone(tmp_path: Path) -> None:
    made = spool(tmp_path, max_bytes=2 * WRITTEN_BYTES)
    item = await made.write(head(1), RESPONSE)
    assert made.has_room(WRITTEN_BYTES)
    made.remove(item)
    assert not made.has_room(WRITTEN_BYTES + 1)
    await made.tidy(0.0)
    assert made.has_room(2 * WRITTEN_BYTES)
    assert files(tmp_path) == []


async def test_whole_segments_go_when_nobody_needs_them(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=20, max_bytes=8 * WRITTEN_BYTES)  # one result a segment
    items = [await made.write(head(job), RESPONSE) for job in range(6)]
    assert len(files(tmp_path)) == 6
    for item in items[:5]:
        made.remove(item)
    await made.tidy(0.0)
    await made.tidy(0.0)
    assert jobs(spool(tmp_path)) == [5]
    made.remove(items[5])
    await made.tidy(0.0)
    assert files(tmp_path) == []


async def test_a_segment_pinned_by_few_results_gives_them_to_the_newest(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=20, max_bytes=10**6)
    items = [await made.write(head(job), RESPONSE) for job in range(5)]
    await made.tidy(0.0)
    await made.tidy(SEGMENT_S)  # it takes no more
    (first,) = files(tmp_path)
    for item in items[1:]:
        made.remove(item)
    await made.tidy(SEGMENT_S)
    await made.tidy(2 * SEGMENT_S - 1)
    assert first in files(tmp_path)
    await made.tidy(2 * SEGMENT_S)
    assert first not in files(tmp_path)
    assert items[0].read() == RESPONSE
    assert jobs(spool(tmp_path)) == [0]
    assert sum(path.stat().st_size for path in files(tmp_path)) < 2 * WRITTEN_BYTES
    made.remove(items[0])
    await made.tidy(2 * SEGMENT_S)
    assert files(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        items[0].read()


async def test_a_write_and_a_sweep_at_once_lose_nothing(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=10**4, max_bytes=8 * WRITTEN_BYTES)
    kept = []

    async def one(job: int) -> None:
        item = await made.write(head(job), RESPONSE)
        if job % 7:
            made.remove(item)
        else:
            kept.append(job)

    for now_s in range(20):
        some = range(20 * now_s, 20 * now_s + 20)
        await asyncio.gather(*map(one, some), made.tidy(4.0 * now_s), made.tidy(4.0 * now_s + 1))
        assert jobs(made) == sorted(kept)
        assert all(item.read() == RESPONSE for item in made)
    assert set(kept) <= set(jobs(spool(tmp_path)))


async def test_what_runs_has_its_room_reserved(tmp_path: Path) -> None:
    made = spool(tmp_path, max_bytes=10_000)  # 3 results
    made.reserve("a", 1)
    made.reserve("a", 6000)
    assert made.has_room(4000)
    assert not made.has_room(4001)
    made.reserve("b", 3000)
    made.reserve("c", 1000)
    assert not made.has_room(0)  # three results will come
    assert made.is_full
    made.release("a")
    made.release("a")
    assert made.has_room(6000)
    assert not made.has_room(6001)
    assert not made.is_full
    await made.write(head(), RESPONSE)
    assert not made.has_room(0)


async def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        made = spool(disk / "spool", max_bytes=10**9)
        assert made.has_room(128 * 1024)
        assert not made.has_room(256 * 1024)  # the disk is smaller than the bound
        filler = disk / "filler"
        fill(filler)
        assert not made.has_room(1)
        big = bytes(64 * 1024)
        with pytest.raises(OSError, match="No space"):
            await made.write(head(response=big), big)
        assert files(disk / "spool") == []
        filler.unlink()
        await made.write(head(1), RESPONSE)
        (whole,) = files(disk / "spool")
        was = whole.read_bytes()
        fill(filler)
        with pytest.raises(OSError, match="No space"):
            await made.write(head(2, response=big), big)
        assert whole.read_bytes() == was
        assert files(disk / "spool") == [whole]
        filler.unlink()
        await made.write(head(3, response=big), big)
        assert made.has_room(1)
        assert jobs(spool(disk / "spool")) == [1, 3]


async def test_others_cannot_read_it(tmp_path: Path) -> None:
    made = spool(tmp_path / "s")
    await made.write(head(), RESPONSE)
    (path,) = files(tmp_path / "s")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError):
        spool(tmp_path / "file" / "s")


def former_file(folder: Path, made: SpoolHead, response: bytes = RESPONSE) -> Path:
    """As the agent wrote it before the journal."""
    path = folder / f"{made.job_id}.{made.epoch}.sealed"
    path.write_bytes(canonical.dumps(asdict(made)) + b"\n" + response)
    return path


async def test_results_of_a_former_version_move_into_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = former_file(tmp_path, head(98))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    former_file(tmp_path, head(99)).write_bytes(b"{}\n")
    for job in range(1, 40):
        former_file(tmp_path, head(job))
    steps: list[str] = []
    sync, unlink = os.fdatasync, Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: (steps.append("sync"), sync(fd)))
        patch.setattr(Path, "unlink", lambda path: (steps.append("unlink"), unlink(path)))
        made = spool(tmp_path)
    assert jobs(made) == list(range(1, 40))
    assert all(item.read() == RESPONSE for item in made)
    assert {path.suffix for path in files(tmp_path)} == {".journal"}
    assert steps.count("unlink") == 41
    assert steps[0] == "sync"
    for item in list(made)[1:]:
        made.remove(item)
    await made.tidy(0.0)
    assert [item.head for item in spool(tmp_path)] == [head(1)]


async def test_a_former_result_that_the_journal_has_is_not_there_twice(tmp_path: Path) -> None:
    made = spool(tmp_path)
    await made.write(head(1), RESPONSE)
    former_file(tmp_path, head(1))
    assert jobs(spool(tmp_path)) == [1]
    assert len(files(tmp_path)) == 1


async def test_a_full_disk_keeps_the_results_of_a_former_version(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        (disk / "spool").mkdir()
        made = former_file(disk / "spool", head(1))
        fill(disk / "filler")
        with pytest.raises(ConfigurationError):
            spool(disk / "spool")
        assert made.exists()


async def test_closing_waits_for_a_result_that_is_being_written(tmp_path: Path) -> None:
    for turns in range(8):
        made = spool(tmp_path)
        writing = asyncio.create_task(made.write(head(), RESPONSE))
        for _ in range(1 + turns):
            await asyncio.sleep(0)
        await made.close()
        item = await writing
        assert jobs(spool(tmp_path)) == [1]
        again = spool(tmp_path)
        again.remove(next(iter(again)))
        await again.close()
        assert files(tmp_path) == []
        with pytest.raises(FileNotFoundError):
            item.read()


async def test_closing_keeps_what_a_stopped_writer_may_have_written(tmp_path: Path) -> None:
    made = spool(tmp_path)
    written = asyncio.get_running_loop().create_future()
    made._journal.close()
    append = made._journal.append

    def slowly(data: bytes, *, durable: bool = True) -> tuple[Segment, int]:
        loop.call_soon_threadsafe(written.set_result, None)
        return append(data, durable=durable)

    loop = asyncio.get_running_loop()
    made._journal.append = slowly  # type: ignore[method-assign]
    writing = asyncio.create_task(made.write(head(), RESPONSE))
    await asyncio.sleep(0)
    assert made._writer is not None
    await asyncio.sleep(0)
    made._writer.cancel()
    with pytest.raises(OSError, match="not written"):
        await writing
    await written
    await made.tidy(0.0)
    await made.close()
    assert jobs(spool(tmp_path)) == [1]


async def test_closing_on_a_full_disk_is_no_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        made = spool(disk / "spool", max_bytes=16 * WRITTEN_BYTES)  # two a segment
        items = [await made.write(head(job), RESPONSE) for job in range(2)]
        made.remove(items[0])
        fill(disk / "filler")
        await made.close()
        assert jobs(spool(disk / "spool")) == [0, 1]  # one is submitted again


async def test_an_unexpected_error_fails_its_writes_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spool(tmp_path)

    def no_memory(_fd: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_memory)
        writing = asyncio.gather(
            *(made.write(head(job), RESPONSE) for job in (1, 2)), return_exceptions=True
        )
        assert [type(error) for error in await asyncio.wait_for(writing, 5)] == [OSError, OSError]
    await asyncio.wait_for(made.write(head(3), RESPONSE), 5)
    assert jobs(made) == jobs(spool(tmp_path)) == [3]


@pytest.mark.parametrize("first", ["a write", "a sweep"])
async def test_a_full_disk_is_freed_and_acknowledgements_are_not_forgotten(
    tmp_path: Path, first: str
) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        made = spool(disk / "spool", max_items=20, max_bytes=16 * WRITTEN_BYTES)  # two a segment
        items = [await made.write(head(job), RESPONSE) for job in range(4)]
        for item in items[:3]:
            made.remove(item)
        fill(disk / "filler")
        if first == "a write":
            with pytest.raises(OSError, match="No space"):
                await made.write(head(9), RESPONSE)
        await made.tidy(0.0)
        assert len(files(disk / "spool")) == 2  # the second one, and what was acknowledged
        assert jobs(spool(disk / "spool")) == [3]


async def test_acknowledgements_wait_for_a_disk_that_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        made = spool(disk / "spool", max_items=20, max_bytes=16 * WRITTEN_BYTES)
        items = [await made.write(head(job), RESPONSE) for job in range(2)]
        made.remove(items[0])
        fill(disk / "filler")
        with pytest.raises(OSError, match="No space"):
            await made.tidy(0.0)
        (disk / "filler").unlink()
        await made.tidy(0.0)
        assert jobs(spool(disk / "spool")) == [1]


async def test_who_submits_learns_of_every_stored_result(tmp_path: Path) -> None:
    made = spool(tmp_path)
    submitter = Submitter(
        cast("JetStreamContext", None), made, SigningKey(bytes(32)), "p", SystemClock(),
        first_backoff_s=1.0,
    )  # fmt: skip
    storing = asyncio.create_task(submitter.store(head(1), RESPONSE))
    await asyncio.sleep(0)
    storing.cancel()
    await submitter.store(head(2), RESPONSE)
    assert submitter.unsettled(60) == [head(1).name, head(2).name]
    submitter.acknowledge(ResultAck(job_id=head(1).job_id, epoch=1, outcome="result_sealed"))
    assert jobs(made) == [2]


async def test_a_result_can_be_read_at_every_step_of_its_move(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=20, max_bytes=10**6)
    first, item = [await made.write(head(job), RESPONSE) for job in range(2)]
    for now_s in (0.0, SEGMENT_S, SEGMENT_S):
        await made.tidy(now_s)
    made.remove(first)
    reads: list[bytes] = []

    def at_every_step(frame: FrameType, event: str, _: object) -> object:
        if frame.f_code is not Spool._move.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            reads.append(item.read())
        return at_every_step

    was = sys.gettrace()
    sys.settrace(at_every_step)
    try:
        await made.tidy(2 * SEGMENT_S)
    finally:
        sys.settrace(was)
    assert reads
    assert set(reads) == {RESPONSE}
