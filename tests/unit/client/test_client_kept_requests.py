"""What a client keeps of its sealed requests: bounded, encrypted, and only what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from nacl.signing import SigningKey

from cocoon.client import kept as keeping
from cocoon.client.choice import Candidate
from cocoon.client.kept import KeptRequest, KeptRequests, load_secret
from cocoon.contracts.events import Quote
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import SystemRandomness
from cocoon.sealing import (
    KeyBundle,
    KeyRing,
    Profile,
    Recipient,
    RequestHeader,
    pack_flags,
    seal_request,
)

RANDOM = SystemRandomness()


class Hand:
    def __init__(self) -> None:
        self.at_ms = 0

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic_s(self) -> float:
        return self.at_ms / 1000


def example(body: bytes = b"{}", again: tuple[str, ...] = ()) -> tuple[KeptRequest, bytes]:
    ring = KeyRing()
    public = ring.generate(RANDOM)
    header = RequestHeader(
        job_id=RANDOM.token(16), model_id=bytes(32), max_price_nanoton=1, max_input_tokens=1,
        max_output_tokens=1, not_after_ms=1, policy_hash=bytes(32),
        flags=pack_flags(Profile.P0, stream=False),
    )  # fmt: skip
    sealed = seal_request(
        header=header, recipients=[Recipient.of(public)], endpoint="/v1/chat/completions",
        body=body, randomness=RANDOM,
    )  # fmt: skip
    quote = Quote(
        model_id="ab" * 32, input_nanoton_per_mtok=1, cached_input_nanoton_per_mtok=1,
        output_nanoton_per_mtok=1, fee_bps=0,
    )  # fmt: skip
    candidate = Candidate(
        "prov", bytes(SigningKey.generate().verify_key), Assurance.ATTESTED,
        KeyBundle(public, 1, 0, 1, bytes(32)), quote, 4096, 0, 4, 1,
    )  # fmt: skip
    made = KeptRequest.of(b"a" * 32, 7, again, sealed, [candidate])
    assert made.sealed() == sealed
    assert made.addressees() == {candidate.bundle.key_id: candidate.addressee}
    return made, sealed.envelope


def requests(state_dir: Path | None, clock: Hand) -> KeptRequests:
    return KeptRequests(state_dir, clock=clock, randomness=RANDOM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / keeping.FOLDER


def test_what_was_kept_comes_back_whole_after_a_restart(tmp_path: Path, folder: Path) -> None:
    made, envelope = example(again=("failed",))
    clock = Hand()
    clock.at_ms = int((tmp_path.stat().st_mtime_ns) // 1_000_000)
    requests(tmp_path, clock).put("name", made)
    again = requests(tmp_path, clock)
    assert again.get("name") == made
    assert again.get("other") is None
    assert envelope not in (folder / "name").read_bytes()
    assert str(len(envelope)) in repr(made)
    assert "ab" not in repr(made)


def test_a_file_that_was_changed_moved_or_anothers_is_dropped(tmp_path: Path, folder: Path) -> None:
    clock = Hand()
    clock.at_ms = int((tmp_path.stat().st_mtime_ns) // 1_000_000)
    first = requests(tmp_path, clock)
    for name in ("changed", "moved", "cut", "foreign"):
        first.put(name, example()[0])
    data = bytearray((folder / "changed").read_bytes())
    data[-1] ^= 1
    (folder / "changed").write_bytes(data)
    (folder / "moved").rename(folder / "elsewhere")
    (folder / "cut").write_bytes(b"12")
    again = requests(tmp_path, clock)
    assert [again.get(name) for name in ("changed", "elsewhere", "cut")] == [None] * 3
    (tmp_path / keeping.SECRET_FILE).write_bytes(bytes(32))
    assert requests(tmp_path, clock).get("foreign") is None
    assert not list(folder.iterdir())


def test_the_store_is_bounded_in_number_bytes_and_age(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_KEPT", 3)
    clock = Hand()
    store = requests(tmp_path, clock)
    for number in range(6):
        store.put(str(number), example()[0])
    assert sorted(file.name for file in folder.iterdir()) == ["3", "4", "5"]
    size = (folder / "3").stat().st_size
    monkeypatch.setattr(keeping, "MAX_KEPT_BYTES", 2 * size)
    store.put("6", example()[0])
    assert sorted(file.name for file in folder.iterdir()) == ["5", "6"]
    store.put("6", example()[0])  # sealed again: one file, counted once
    assert sorted(file.name for file in folder.iterdir()) == ["5", "6"]
    clock.at_ms = keeping.KEPT_MS + 1
    assert store.get("6") is None
    assert not list(folder.iterdir())


def test_a_full_disk_costs_the_memory_and_not_the_job(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = requests(tmp_path, Hand())

    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "_write", full)
    store.put("name", example()[0])
    assert store.get("name") is None


def test_names_differ_by_client_caller_and_key(tmp_path: Path, folder: Path) -> None:
    clock = Hand()
    plain, mine, others = (requests(at, clock) for at in (None, tmp_path, tmp_path / "other"))
    names = {item.name(*who) for item in (plain, mine, others) for who in ("ak", "bk", "al")}
    assert len(names) == 9
    assert mine.name("a", "k") == requests(tmp_path, clock).name("a", "k")
    assert plain.name("a", "k") == requests(None, clock).name("a", "k")
    assert all(len(name) == 64 for name in names)


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    state_dir = tmp_path / "new" / "state"
    first = load_secret(state_dir, RANDOM)
    assert load_secret(state_dir, RANDOM) == first
    assert len(first) == 32
    assert [file.name for file in state_dir.iterdir()] == [keeping.SECRET_FILE]
