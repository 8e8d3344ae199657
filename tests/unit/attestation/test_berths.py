"""Berths change hands only once their provider's last login and its patience are over."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cocoon.kernel.pace import Bucket, Buckets
from services.attestation.berths import Berth, Berths

COUNT, PATIENCE_MS, MOVE_IN_MS = 3, 100, 150
NAMES = [f"prov_{n}" for n in range(6)]


class Harbour(RuleBasedStateMachine):
    """Providers that come, log in and stay away, against a plain table."""

    def __init__(self) -> None:
        super().__init__()
        self.berths, self.now_ms = Berths(COUNT, PATIENCE_MS, MOVE_IN_MS), 1
        self.table: dict[int, tuple[str, int, int]] = {}

    @rule(passed_ms=st.integers(1, 150))
    def wait(self, passed_ms: int) -> None:
        self.now_ms += passed_ms

    @rule(name=st.sampled_from(NAMES), login_ms=st.integers(0, 80))
    def come(self, name: str, login_ms: int) -> None:
        mine = self.berths.of(name)
        number = mine.number if mine else self.berths.free(self.now_ms)
        deserted = [
            n
            for n, (_, held, taken) in self.table.items()
            if self.now_ms > max(held + PATIENCE_MS, taken + MOVE_IN_MS)
        ]
        if number is None:
            assert len(self.table) == COUNT
            assert deserted == []
            return
        if mine is None and number in self.table:
            assert len(self.table) == COUNT  # nobody loses a berth while another is empty
            assert number in deserted
        until_ms = self.now_ms + login_ms if login_ms else 0  # 0: it has not connected again yet
        taken_ms = mine.taken_ms if mine else self.now_ms
        self.berths.put(Berth(number, name, until_ms, taken_ms))
        self.table[number] = (name, until_ms, taken_ms)

    @rule()
    def start_anew(self) -> None:
        taken = [Berth(n, *row) for n, row in self.table.items()]
        self.berths.load([*taken, Berth(COUNT + 1, "prov_beyond", 0)])
        assert self.berths.of("prov_beyond") is None

    @invariant()
    def one_each(self) -> None:
        assert len(self.berths) == len(self.table)
        for number, (name, held, taken) in self.table.items():
            assert self.berths.of(name) == Berth(number, name, held, taken)
        assert len({name for name, *_ in self.table.values()}) == len(self.table)


TestHarbour = Harbour.TestCase
TestHarbour.settings = settings(deadline=None)


def test_a_bucket_gives_its_burst_and_then_its_pace() -> None:
    bucket = Bucket(per_s=2.0, burst=3)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(100.4)
    assert bucket.take(100.5)
    assert not bucket.take(100.6)
    assert [bucket.take(1_000_000.0) for _ in range(4)] == [True, True, True, False]


def test_each_name_has_a_bucket_and_only_so_many_are_remembered() -> None:
    buckets = Buckets(per_s=0.001, burst=1, limit=2)
    assert buckets.take("a", 1.0)
    assert not buckets.take("a", 1.0)
    assert buckets.take("b", 1.0)
    assert buckets.take("c", 1.0)  # a is forgotten
    assert not buckets.take("c", 1.0)
    assert len(buckets) == 2
