"""Receipts and their chain, key bundles and their times, and the memory against replay."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from nacl.signing import SigningKey

from cocoon.kernel.errors import SealingError
from cocoon.sealing import (
    RECEIPT_BYTES,
    KeyBundle,
    KeyRing,
    Receipt,
    Remembered,
    ReplayMemory,
    Status,
    check_chain,
    key_id,
    latest_not_after_ms,
    receipt_hash,
    verify_bundle,
    verify_receipt,
)
from cocoon.sealing.keys import BUNDLE_BYTES, CLOCK_SKEW_MS, MAX_BUNDLE_MS
from cocoon.sealing.replay import JOB_BYTES, MAX_OUTCOMES, MINUTE_MS
from tests.support import sealing_world as world
from tests.support.sentences import says_why

OTHER = SigningKey(b"\x07" * 32)


def code_of(refused: pytest.ExceptionInfo[SealingError]) -> str | None:
    return refused.value.code


@st.composite
def receipts(draw: st.DrawFn) -> Receipt:
    wide, short = st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16)
    u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
    return Receipt(
        status=draw(st.sampled_from(Status)), job_id=draw(short), epoch=draw(u32),
        key_id=draw(short), model_id=draw(wide), quote_id=draw(wide), req_hash=draw(wide),
        resp_hash=draw(wide), prompt_commit=draw(wide), output_commit=draw(wide),
        input_tokens=draw(u32), cached_input_tokens=draw(u32), output_tokens=draw(u32),
        reasoning_tokens=draw(u32), price_nanoton=draw(st.integers(0, 2**63 - 1)),
        opened_ms=draw(u64), first_ms=draw(u64), last_ms=draw(u64), evidence_id=draw(wide),
        seq=draw(u64), prev_receipt_hash=draw(wide),
    )  # fmt: skip


def plain_receipt(**changes: object) -> Receipt:
    receipt = Receipt(
        job_id=world.JOB, key_id=bytes(16), model_id=world.MODEL, req_hash=bytes(32),
        resp_hash=bytes(32), prompt_commit=bytes(32), output_commit=bytes(32),
        **world.RECEIPT_FIELDS,  # type: ignore[arg-type]
    )  # fmt: skip
    return replace(receipt, **changes)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(receipts())
def test_every_receipt_comes_back_as_it_went(receipt: Receipt) -> None:
    raw = receipt.sign(world.SIGNER)
    assert len(raw) == RECEIPT_BYTES == 420
    assert verify_receipt(raw, world.SIGN_PK) == Receipt.decode(raw) == receipt


def test_every_flipped_byte_of_a_receipt_is_refused() -> None:
    raw = plain_receipt().sign(world.SIGNER)
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(SealingError, check=says_why):
            verify_receipt(bytes(flipped), world.SIGN_PK)


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (0, b"CAIX", "bad_magic"),
        (4, b"\x01", "bad_magic"),
        (5, b"\x02", "bad_suite"),
        (7, b"\x05", "receipt_mismatch"),
        (252, b"\xff", "receipt_mismatch"),
    ],
)
def test_a_receipt_of_another_form_is_refused_before_its_signature(
    at: int, value: bytes, code: str
) -> None:
    raw = bytearray(plain_receipt().sign(world.SIGNER))
    raw[at : at + len(value)] = value
    with pytest.raises(SealingError, check=says_why) as refused:
        verify_receipt(bytes(raw), world.SIGN_PK)
    assert code_of(refused) == code


def test_a_receipt_by_another_key_or_of_another_length_is_refused() -> None:
    raw = plain_receipt().sign(OTHER)
    for data, public, code in (
        (raw, world.SIGN_PK, "receipt_sig"),
        (raw[:-1], bytes(OTHER.verify_key), "truncated"),
        (raw, bytes(31), "bad_key"),
        (raw, bytes(32), "receipt_sig"),  # a low-order signer signs nothing
    ):
        with pytest.raises(SealingError, check=says_why) as refused:
            verify_receipt(data, public)
        assert code_of(refused) == code


@pytest.mark.parametrize(
    "change", [{"job_id": b""}, {"price_nanoton": 2**63}, {"price_nanoton": -1}, {"epoch": 2**32}]
)
def test_a_receipt_out_of_range_is_not_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"bytes|range|price", check=says_why):
        plain_receipt(**change).encode_body()


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("job_id", 16), ("key_id", 16), ("model_id", 32), ("quote_id", 32), ("req_hash", 32),
        ("resp_hash", 32), ("prompt_commit", 32), ("output_commit", 32), ("evidence_id", 32),
        ("prev_receipt_hash", 32),
    ],
)  # fmt: skip
def test_each_id_and_hash_of_a_receipt_has_its_width(name: str, width: int) -> None:
    for wrong in (width - 1, width + 1):
        with pytest.raises(ValueError, match=f"^{name} is {width} bytes$"):
            plain_receipt(**{name: bytes(wrong)})


def test_a_receipt_at_the_ends_of_its_ranges_is_made_and_read() -> None:
    for change in ({"price_nanoton": 2**63 - 1}, {"price_nanoton": 0}, {"status": Status.FAILED}):
        receipt = plain_receipt(**change)
        assert verify_receipt(receipt.sign(world.SIGNER), world.SIGN_PK) == receipt


def test_receipts_chain_and_a_gap_shows() -> None:
    chain: list[bytes] = []
    for seq in range(4):
        previous = receipt_hash(chain[-1]) if chain else bytes(32)
        receipt = plain_receipt(seq=seq, prev_receipt_hash=previous, job_id=bytes([seq]) * 16)
        chain.append(receipt.sign(world.SIGNER))
    for before, after in zip([None, *chain], chain, strict=False):
        check_chain(before, after)
    fork = plain_receipt(seq=2, prev_receipt_hash=receipt_hash(chain[1]), price_nanoton=1)
    for before, after in (
        (None, chain[1]),
        (None, plain_receipt(seq=1).sign(world.SIGNER)),
        (chain[0], plain_receipt(seq=2, prev_receipt_hash=receipt_hash(chain[0])).sign(OTHER)),
        (chain[0], chain[2]),
        (chain[1], chain[1]),
        (fork.sign(world.SIGNER), chain[3]),
        (chain[0], chain[0]),
    ):
        with pytest.raises(SealingError, check=says_why) as refused:
            check_chain(before, after)
        assert (code_of(refused), refused.value.param) == ("receipt_mismatch", "seq")


def bundle(**changes: object) -> KeyBundle:
    made = KeyBundle(
        x25519_pk=world.recipients()[0].x25519_pk, epoch=3, not_before_ms=world.NOW_MS,
        not_after_ms=world.NOW_MS + MAX_BUNDLE_MS, evidence_id=world.EVIDENCE,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def check_bundle(raw: bytes, **changes: object) -> KeyBundle:
    options: dict[str, object] = {
        "ed25519_pk": world.SIGN_PK, "evidence_id": world.EVIDENCE, "now_ms": world.NOW_MS,
        **changes,
    }  # fmt: skip
    return verify_bundle(raw, **options)  # type: ignore[arg-type]


def test_a_key_bundle_comes_back_as_it_went() -> None:
    raw = bundle().sign(world.SIGNER)
    assert len(raw) == BUNDLE_BYTES == 157
    assert raw[:5] == b"CAIK\x01"
    assert check_bundle(raw) == bundle()
    assert bundle().key_id == key_id(bundle().x25519_pk)


def test_every_flipped_byte_of_a_key_bundle_is_refused() -> None:
    raw = bundle().sign(world.SIGNER)
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1
        with pytest.raises(SealingError, check=says_why):
            check_bundle(bytes(flipped))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"now_ms": world.NOW_MS - CLOCK_SKEW_MS - 1}, "expired"),
        ({"now_ms": world.NOW_MS + MAX_BUNDLE_MS}, "expired"),
        ({"evidence_id": bytes(32)}, "bad_key"),
        ({"ed25519_pk": bytes(OTHER.verify_key)}, "receipt_sig"),
    ],
)
def test_a_key_bundle_out_of_time_or_place_is_refused(
    options: dict[str, object], code: str
) -> None:
    with pytest.raises(SealingError, check=says_why) as refused:
        check_bundle(bundle().sign(world.SIGNER), **options)
    assert code_of(refused) == code


@pytest.mark.parametrize("at_ms", [world.NOW_MS - CLOCK_SKEW_MS, world.NOW_MS + MAX_BUNDLE_MS - 1])
def test_a_key_bundle_is_good_from_its_first_to_its_last_millisecond(at_ms: int) -> None:
    assert check_bundle(bundle().sign(world.SIGNER), now_ms=at_ms) == bundle()


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [(0, b"CAIR", "bad_magic"), (4, b"\x02", "bad_suite"), (157, b"\0", "truncated")],
)
def test_a_key_bundle_of_another_form_is_refused_before_its_signature(
    at: int, value: bytes, code: str
) -> None:
    raw = bytearray(bundle().sign(world.SIGNER))
    raw[at : at + len(value)] = value
    with pytest.raises(SealingError, check=says_why) as refused:
        check_bundle(bytes(raw))
    assert code_of(refused) == code


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x25519_pk": bytes(31)}, "are 32 bytes"),
        ({"evidence_id": bytes(33)}, "are 32 bytes"),
        ({"epoch": 2**64}, "out of its range"),
        ({"epoch": -1}, "out of its range"),
        ({"suite": 256}, "out of its range"),
    ],
)
def test_a_key_bundle_out_of_range_is_not_made(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says, check=says_why):
        bundle(**change).encode_body()


def test_the_shortest_life_of_a_key_bundle_is_a_millisecond() -> None:
    short = bundle(not_after_ms=world.NOW_MS + 1)
    assert check_bundle(short.sign(world.SIGNER)) == short
    body = bytearray(short.encode_body())
    body[53:61] = body[45:53]  # it ends when it begins
    signed = bytes(body) + world.SIGNER.sign(b"cai/1 key bundle\0" + bytes(body)).signature
    with pytest.raises(SealingError, match="not allowed", check=says_why) as refused:
        check_bundle(signed, now_ms=world.NOW_MS - 1)
    assert code_of(refused) == "bad_key"


def test_a_key_bundle_can_not_claim_a_longer_life() -> None:
    for end in (world.NOW_MS + MAX_BUNDLE_MS + 1, world.NOW_MS):
        with pytest.raises(ValueError, match="12 minutes", check=says_why):
            bundle(not_after_ms=end).sign(world.SIGNER)
    body = bytearray(bundle().encode_body())
    body[45:53] = (world.NOW_MS + MAX_BUNDLE_MS + 1).to_bytes(8, "big")
    assert body[53:61] == (world.NOW_MS + MAX_BUNDLE_MS).to_bytes(8, "big")
    body[45:53], body[53:61] = bytes(8), (world.NOW_MS * 2).to_bytes(8, "big")
    signed = bytes(body) + world.SIGNER.sign(b"cai/1 key bundle\0" + bytes(body)).signature
    with pytest.raises(SealingError, check=says_why) as refused:
        check_bundle(signed)
    assert code_of(refused) == "bad_key"


def test_two_bundles_overlap_and_the_earlier_end_bounds_the_request() -> None:
    first = bundle()
    second = bundle(
        x25519_pk=world.recipients()[1].x25519_pk, epoch=4, not_before_ms=world.NOW_MS + 600_000,
        not_after_ms=world.NOW_MS + 600_000 + MAX_BUNDLE_MS,
    )  # fmt: skip
    for now_ms in (world.NOW_MS + 600_000, world.NOW_MS + 719_999):
        first.check_time(now_ms)
        second.check_time(now_ms)
    assert latest_not_after_ms([second, first]) == first.not_after_ms


def test_a_ring_holds_few_keys_forgets_on_request_and_is_never_pickled() -> None:
    ring = KeyRing()
    publics = [ring.generate(world.Counted(str(index))) for index in range(4)]
    with pytest.raises(ValueError, match="full", check=says_why):
        ring.generate(world.Counted("more"))
    ring.forget(key_id(publics[0]))
    ring.forget(key_id(publics[0]))
    assert ring.key_ids() == {key_id(public) for public in publics[1:]}
    assert repr(ring) == "KeyRing(3 keys)"
    with pytest.raises(TypeError, match=r"^a key ring is not serialised$"):
        pickle.dumps(ring)


def begin(memory: ReplayMemory[str], job: int, **changes: object) -> object:
    options: dict[str, object] = {
        "req_hash": b"h", "not_after_ms": 100, "now_ms": 0, **changes,
    }  # fmt: skip
    return memory.begin(bytes([job]) * 16, b"enc", **options)  # type: ignore[arg-type]


def test_a_duplicate_gets_what_was_stored_and_never_runs_again() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    assert begin(memory, 1) is None
    running = begin(memory, 1)
    assert running is not None
    assert running.outcome is None  # type: ignore[attr-defined]
    memory.finish(bytes([1]) * 16, b"enc", "stored")
    assert begin(memory, 1).outcome == "stored"  # type: ignore[attr-defined]
    assert begin(memory, 1, now_ms=100).outcome == "stored"  # type: ignore[attr-defined]


def test_a_job_may_begin_in_its_last_millisecond() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    assert begin(memory, 1, not_after_ms=100, now_ms=100) is None
    with pytest.raises(SealingError, check=says_why) as refused:
        begin(memory, 2, not_after_ms=100, now_ms=101)
    assert code_of(refused) == "expired"
    assert len(memory) == 1


def test_the_newest_outcomes_are_at_hand_and_an_older_job_is_still_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cocoon.sealing.replay.MAX_OUTCOMES", 2)
    memory: ReplayMemory[str] = ReplayMemory()
    for job in (1, 2, 3):
        begin(memory, job)
        memory.finish(bytes([job]) * 16, b"enc", f"outcome {job}")
    outcomes = [begin(memory, job).outcome for job in (1, 2, 3)]  # type: ignore[attr-defined]
    assert outcomes == [None, "outcome 2", "outcome 3"]
    assert len(memory) == 3


def test_a_memory_holds_as_many_jobs_as_its_bytes_allow_and_room_comes_back() -> None:
    memory: ReplayMemory[str] = ReplayMemory(JOB_BYTES * 3 - 1)
    begin(memory, 1, not_after_ms=MINUTE_MS)
    begin(memory, 2, not_after_ms=MINUTE_MS + 5)
    for _ in range(2):
        with pytest.raises(SealingError, match="try another", check=says_why):
            begin(memory, 3, not_after_ms=3 * MINUTE_MS, now_ms=MINUTE_MS)
    assert begin(memory, 3, not_after_ms=3 * MINUTE_MS, now_ms=2 * MINUTE_MS) is None
    assert begin(memory, 4, not_after_ms=3 * MINUTE_MS, now_ms=2 * MINUTE_MS) is None
    assert len(memory) == 2
    assert memory.begin(
        bytes([3]) * 16, b"another enc", req_hash=b"h", not_after_ms=10**6, now_ms=10**6
    ) is None  # fmt: skip
    memory.finish(b"nobody's job", b"enc", "nothing to keep")


def test_what_ends_takes_no_other_job_s_outcome_along() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    for job, not_after_ms in ((1, 5), (2, 3 * MINUTE_MS)):
        begin(memory, job, not_after_ms=not_after_ms)
        memory.finish(bytes([job]) * 16, b"enc", f"outcome {job}")
    later = begin(memory, 2, not_after_ms=3 * MINUTE_MS, now_ms=2 * MINUTE_MS)
    assert later == Remembered(b"h", "outcome 2")
    assert len(memory) == 1


def test_the_smallest_memory_holds_one_job() -> None:
    memory: ReplayMemory[str] = ReplayMemory(JOB_BYTES)
    assert begin(memory, 1) is None
    with pytest.raises(SealingError, check=says_why):
        begin(memory, 2)


def test_another_body_under_the_same_header_is_a_replay() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    begin(memory, 1)
    with pytest.raises(SealingError, check=says_why) as refused:
        begin(memory, 1, req_hash=b"other")
    assert code_of(refused) == "replay"


def test_a_full_memory_is_busy_and_forgets_only_what_expired() -> None:
    memory: ReplayMemory[str] = ReplayMemory(2 * JOB_BYTES)
    begin(memory, 1, not_after_ms=MINUTE_MS - 1)
    begin(memory, 2, not_after_ms=MINUTE_MS)
    with pytest.raises(SealingError, check=says_why) as refused:
        begin(memory, 3)
    assert code_of(refused) == "busy"
    with pytest.raises(SealingError, check=says_why):
        begin(memory, 3, not_after_ms=MINUTE_MS, now_ms=MINUTE_MS - 1)
    assert begin(memory, 3, not_after_ms=MINUTE_MS, now_ms=MINUTE_MS) is None
    with pytest.raises(SealingError, check=says_why) as late:
        begin(memory, 1, not_after_ms=MINUTE_MS - 1, now_ms=MINUTE_MS)
    assert code_of(late) == "expired"
    memory.finish(bytes([1]) * 16, b"enc", "too late")
    assert len(memory) == 2
    with pytest.raises(ValueError, match="at least one", check=says_why):
        ReplayMemory(JOB_BYTES - 1)


def test_a_repeat_never_runs_again_however_many_jobs_came_since() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    begin(memory, 1)
    memory.finish(bytes([1]) * 16, b"enc", "stored")
    for number in range(MAX_OUTCOMES):
        name = number.to_bytes(16, "big")
        memory.begin(name, b"other", req_hash=b"h", not_after_ms=100, now_ms=0)
    repeat = begin(memory, 1)
    assert repeat == Remembered(b"h")  # begun, but its outcome is no longer at hand


def test_what_a_remembered_job_costs_stays_under_what_is_counted_for_it() -> None:
    memory: ReplayMemory[str] = ReplayMemory()
    names = [number.to_bytes(16, "big") for number in range(200_000)]
    for name in names[:MAX_OUTCOMES]:
        memory.begin(name, b"e", req_hash=b"h", not_after_ms=0, now_ms=0)
    tracemalloc.start()
    try:
        for name in names[MAX_OUTCOMES:]:
            memory.begin(name, b"e", req_hash=b"h", not_after_ms=0, now_ms=0)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    outcomes = 400 * MAX_OUTCOMES  # theirs are bounded by their number
    assert used < JOB_BYTES * len(names) + outcomes


class ReplayMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order: a job begins at most once, and repeats are known."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.memory: ReplayMemory[int] = ReplayMemory(3 * JOB_BYTES)
        self.now = 0
        self.begun: set[bytes] = set()

    @rule(target=jobs, number=st.integers(0, 255), ttl=st.integers(0, 3 * MINUTE_MS))
    def job(self, number: int, ttl: int) -> tuple[bytes, int]:
        name = bytes([number]) * 8 + (self.now + ttl).to_bytes(8, "big")
        return name, self.now + ttl

    @rule(job=jobs)
    def begin(self, job: tuple[bytes, int]) -> None:
        name, not_after_ms = job
        try:
            known = self.memory.begin(
                name, b"e", req_hash=b"h", not_after_ms=not_after_ms, now_ms=self.now
            )
        except SealingError as refused:
            expected = "expired" if self.now > not_after_ms else "busy"
            assert refused.code == expected  # noqa: PT017 - inside a state machine's rule
            assert expected == "expired" or name not in self.begun
            return
        assert (known is not None) == (name in self.begun)
        self.begun.add(name)

    @rule(step=st.integers(0, 2 * MINUTE_MS))
    def pass_time(self, step: int) -> None:
        self.now += step

    @invariant()
    def stays_bounded(self) -> None:
        assert len(self.memory) <= 3


TestReplayMachine = ReplayMachine.TestCase
TestReplayMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
