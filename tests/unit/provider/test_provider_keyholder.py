"""The key holder's process: one key, single jobs' answers, and nothing after its end."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest

from cocoon.kernel.errors import SealingError, Unavailable
from cocoon.sealing import KeyRing, key_id
from cocoon.sealing.envelope import FIXED_BYTES
from services.provider.epochs import MAX_EPOCHS, KeyEpochs, KeyProcess
from services.provider.keyholder import ANSWER, QUESTION, answer

FIXED = b"CAI1".ljust(FIXED_BYTES, b"\x01")
ENC = bytes(KeyRing().add(b"\x07" * 32))  # some valid public key


def test_an_answer_is_what_the_ring_derives() -> None:
    ring = KeyRing()
    key = key_id(ring.add(b"\x01" * 32))
    question = QUESTION.pack(9, key, ENC, FIXED, b"\x02" * 32)
    number, code, exports = ANSWER.unpack(answer(ring, question))
    assert (number, code) == (9, 0)
    assert exports == b"".join(ring.job_exports(key, ENC, FIXED, b"\x02" * 32))
    wrong = QUESTION.pack(9, bytes(16), ENC, FIXED, b"\x02" * 32)
    assert ANSWER.unpack(answer(ring, wrong))[1] == 1
    low_order = QUESTION.pack(9, key, bytes(32), FIXED, b"\x02" * 32)
    assert ANSWER.unpack(answer(ring, low_order))[1] == 2


async def test_many_questions_at_once_get_their_own_answers() -> None:
    process, public = await KeyProcess.start(60_000)
    try:
        secrets_ = [secrets.token_bytes(32) for _ in range(300)]
        key = key_id(public)
        found = await asyncio.gather(*(process.ask(key, ENC, FIXED, one) for one in secrets_))
        assert len({one.ephemeral_dh for one in found}) == 300
        assert len({one.wrap_key for one in found}) == 1
        assert found[5] == await process.ask(key, ENC, FIXED, secrets_[5])
        with pytest.raises(SealingError) as caught:
            await process.ask(bytes(16), ENC, FIXED, secrets_[0])
        assert caught.value.code == "unknown_key"
        assert "secret" in repr(found[0])
    finally:
        process.end()
    with pytest.raises(SealingError) as caught:
        await process.ask(key, ENC, FIXED, secrets_[0])
    assert caught.value.code == "unknown_key"


async def test_a_holder_ends_itself_when_its_time_is_over() -> None:
    process, public = await KeyProcess.start(300)
    await asyncio.sleep(0.2)
    for _ in range(500):
        try:
            await process.ask(key_id(public), ENC, FIXED, b"\x02" * 32)
        except SealingError:
            break
        await asyncio.sleep(0.02)
    with pytest.raises(SealingError) as caught:
        await process.ask(key_id(public), ENC, FIXED, b"\x02" * 32)
    assert caught.value.code == "unknown_key"
    process.end()


async def test_a_holder_may_not_dump_core_or_be_read_by_its_user() -> None:
    process, _ = await KeyProcess.start(60_000)
    try:
        _check_hardened(int(repr(process).removeprefix("KeyProcess(").removesuffix(")")))
    finally:
        process.end()


def _check_hardened(pid: int) -> None:
    limits = Path(f"/proc/{pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    # a process that is not dumpable belongs to root in /proc, whoever runs it
    assert Path(f"/proc/{pid}/mem").stat().st_uid == 0


async def test_keys_serve_from_their_evidence_until_their_end() -> None:
    epochs = KeyEpochs(epoch_ms=1000, overlap_ms=500)
    try:
        first = await epochs.make(10_000)
        assert epochs.key_ids() == frozenset()
        first.evidence_id = bytes(32)
        assert epochs.get(first.key_id) is first
        assert (first.not_after_ms, epochs.next_due_ms(first)) == (11_500, 11_000)
        epochs.prune(11_499)
        assert epochs.key_ids() == {first.key_id}
        epochs.prune(11_500)
        assert epochs.get(first.key_id) is None
    finally:
        epochs.close()


async def test_no_more_keys_are_held_than_are_bounded() -> None:
    epochs = KeyEpochs(epoch_ms=60_000, overlap_ms=500)
    try:
        for _ in range(MAX_EPOCHS):
            await epochs.make(0)
        with pytest.raises(Unavailable):
            await epochs.make(0)
    finally:
        epochs.close()
