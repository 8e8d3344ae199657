"""A journal against a model of it: what was durable and is owed survives a crash at any byte."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.provider.journal import (
    SpoolHead,
    encode_acks,
    encode_result,
    read_records,
)
from services.provider.spool import SEGMENT_S, Spool

MAX_BYTES = 8 * 1500  # two or three results a segment


def response_of(job: int) -> bytes:
    return (hashlib.sha512(b"%d" % job).digest() * 11)[: job * 37 % 700]


def head_of(job: int) -> SpoolHead:
    response = response_of(job)
    return SpoolHead(
        f"{job:032x}", 1 + job % 3, f"{job:064x}", f"{job:0840x}",
        hashlib.sha256(response).hexdigest(), len(response),
    )  # fmt: skip


def opened(folder: str) -> Spool:
    spool = Spool(Path(folder), 1000, MAX_BYTES)
    spool.open()
    return spool


def sizes(folder: str) -> list[int]:
    return [path.stat().st_size for path in Path(folder).iterdir()]


def kept(spool: Spool) -> dict[int, bytes]:
    return {int(item.head.job_id, 16): item.read() for item in spool}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 4)),
        st.tuples(st.just("acknowledge"), st.integers(0, 99)),
        st.tuples(st.just("tidy"), st.sampled_from((0.25, SEGMENT_S))),
        st.tuples(st.just("crash"), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_what_was_written_and_not_acknowledged_is_there(steps: list[tuple[str, float]]) -> None:
    asyncio.run(follow(steps))


async def follow(steps: list[tuple[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool, owed, made, now_s = opened(folder), set(), 0, 0.0
        for step, value in steps:
            if step == "write":
                new = range(made, made + int(value))
                made += int(value)
                await asyncio.gather(*(spool.write(head_of(job), response_of(job)) for job in new))
                owed |= set(new)
            elif step == "acknowledge" and owed:
                job = sorted(owed)[int(value) % len(owed)]
                item = spool.of_job(head_of(job).job_id)
                assert item is not None
                spool.remove(item)
                owed.discard(job)
            elif step == "tidy":
                now_s += value
                await spool.tidy(now_s)
                if not owed:
                    assert sizes(folder) == []
            elif step == "crash":
                spool = opened(folder)
                # acknowledged ones may come back, and are acknowledged again
                assert owed <= set(kept(spool)) <= set(range(made))
                for item in spool:
                    if int(item.head.job_id, 16) not in owed:
                        spool.remove(item)
            found = kept(spool)
            assert found == {job: response_of(job) for job in owed}
            on_disk = sum(sizes(folder))
            assert spool.has_room(MAX_BYTES - on_disk) or on_disk > MAX_BYTES
            assert not spool.has_room(MAX_BYTES - on_disk + 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=3))), st.data())
def test_a_file_cut_at_any_byte_gives_its_whole_records(
    order: list[int | list[int]], data: st.DataObject
) -> None:
    records, whole = [], [0]
    for entry in order:
        if isinstance(entry, int):
            records.append(encode_result(head_of(entry), response_of(entry)))
        else:
            records.append(encode_acks([head_of(job).name for job in entry]))
        whole.append(whole[-1] + len(records[-1]))
    raw = b"".join(records)
    for cut in {0, len(raw), *(data.draw(st.integers(0, len(raw))) for _ in range(20))}:
        found = list(read_records(raw[:cut]))
        assert len(found) == sum(end <= cut for end in whole[1:])
        for entry, record in zip(order, found, strict=False):
            if isinstance(entry, int):
                head, at = record
                assert head == head_of(entry)
                assert raw[at : at + head.response_bytes] == response_of(entry)
            else:
                assert record == [head_of(job).name for job in entry]


def test_the_tail_may_be_torn_at_every_byte() -> None:
    first, second = (encode_result(head_of(job), response_of(job)) for job in (1, 2))
    for cut in range(len(second)):
        assert [head for head, _ in read_records(first + second[:cut])] == [head_of(1)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.data())
def test_a_damaged_record_is_left_out_and_those_after_it_are_read(
    damaged: int, data: st.DataObject
) -> None:
    parts = [bytearray(encode_result(head_of(job), response_of(job))) for job in range(1, 5)]
    at = data.draw(st.integers(0, len(parts[damaged]) - 1))
    parts[damaged][at] ^= data.draw(st.integers(1, 255))
    found = [record[0] for record in read_records(b"".join(parts)) if isinstance(record, tuple)]
    assert found == [head_of(job) for job in range(1, 5) if job != damaged + 1]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(raw: bytes) -> None:
    magic = encode_acks([])[:4]
    for data in (raw, magic + raw, magic + b"\x01" + raw, magic + b"\x02" + raw):
        assert all(isinstance(record, list | tuple) for record in read_records(data))
