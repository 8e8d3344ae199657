"""The spool keeps sealed results through a crash and never keeps a damaged one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cocoon.kernel.errors import ConfigurationError
from services.provider.spool import Spool, SpoolHead
from tests.support.small_disk import fill, small_disk

RESPONSE = b"CAI1" + bytes(range(256)) + b"\n" * 3


def head(job: int = 1, epoch: int = 1, response: bytes = RESPONSE) -> SpoolHead:
    return SpoolHead(
        job_id=f"{job:032x}", epoch=epoch, req_hash="ab" * 32, receipt="cd" * 420,
        blob_hash=hashlib.sha256(response).hexdigest(), response_bytes=len(response),
    )  # fmt: skip


def spool(folder: Path, **changes: int) -> Spool:
    made = Spool(folder, **{"max_items": 3, "max_bytes": 10_000, **changes})
    made.open()
    return made


def test_a_written_result_is_there_after_a_restart(tmp_path: Path) -> None:
    first = spool(tmp_path / "s")
    first.keep(first.write(head(), RESPONSE))
    again = spool(tmp_path / "s")
    (item,) = again
    assert item.head == head()
    assert item.read() == RESPONSE
    assert again.of_job(head().job_id) == item
    again.remove(item)
    again.remove(item)
    again.delete([item, item])
    assert len(spool(tmp_path / "s")) == 0


def test_the_newest_epoch_of_a_job_answers_a_repeat(tmp_path: Path) -> None:
    made = spool(tmp_path)
    for epoch in (1, 3, 2):
        made.keep(made.write(head(epoch=epoch), RESPONSE))
    item = made.of_job(head().job_id)
    assert item is not None
    assert item.head.epoch == 3
    assert len(made) == 3
    made.remove(item)
    left = made.of_job(head().job_id)
    assert left is not None
    assert left.head.epoch == 2


def test_damaged_and_half_written_files_are_removed(tmp_path: Path) -> None:
    made = spool(tmp_path)
    whole = made.write(head(1), RESPONSE).path
    cut = made.write(head(2), RESPONSE).path
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "x.partial").write_bytes(b"half")
    (tmp_path / "y.sealed").write_bytes(b"{}\n")
    (tmp_path / "z.sealed").write_bytes(b"")
    assert [item.path for item in spool(tmp_path)] == [whole]
    assert list(tmp_path.iterdir()) == [whole]


def test_a_full_spool_says_so(tmp_path: Path) -> None:
    made = spool(tmp_path, max_items=2)
    assert made.has_room()
    for job in (1, 2):
        made.keep(made.write(head(job), RESPONSE))
    assert not made.has_room()
    made.remove(next(iter(made)))
    assert made.has_room()
    assert not spool(tmp_path, max_bytes=len(RESPONSE)).has_room()


def test_what_runs_has_its_room_reserved(tmp_path: Path) -> None:
    made = spool(tmp_path)  # 3 results, 10,000 bytes
    assert made.reserve("a", 6000)
    assert not made.reserve("a", 1)
    assert not made.reserve("b", 4001)
    assert made.reserve("b", 3000)
    assert made.reserve("c", 1000)
    assert not made.has_room(0)  # three results will come
    made.release("a")
    made.release("a")
    assert made.has_room(6000)
    assert not made.has_room(6001)
    made.keep(made.write(head(), RESPONSE))
    assert not made.has_room(0)


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        made = spool(disk / "spool", max_bytes=10**9)
        assert made.has_room(128 * 1024)
        assert not made.has_room(256 * 1024)  # the disk is smaller than the bound
        filler = disk / "filler"
        fill(filler)
        assert not made.has_room(1)
        big = bytes(64 * 1024)
        with pytest.raises(OSError, match="No space"):
            made.write(head(response=big), big)
        assert list((disk / "spool").iterdir()) == []
        filler.unlink()
        made.keep(made.write(head(response=big), big))
        assert made.has_room(1)
        assert len(spool(disk / "spool")) == 1


def test_others_cannot_read_it(tmp_path: Path) -> None:
    made = spool(tmp_path / "s")
    assert made.write(head(), RESPONSE).path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError):
        spool(tmp_path / "file" / "s")
