"""What a client keeps of its sealed requests: bounded, encrypted, and only what it wrote."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from cocoon.client import files
from cocoon.client import kept as keeping
from cocoon.client.choice import Candidate
from cocoon.client.kept import KeptRequest, KeptRequests, load_secret
from cocoon.contracts.events import Quote
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import SystemRandomness
from cocoon.kernel.errors import ConfigurationError
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


@contextmanager
def requests(state_dir: Path | None, clock: Hand) -> Iterator[KeptRequests]:
    with closing(KeptRequests(state_dir, clock=clock, randomness=RANDOM)) as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / keeping.FOLDER


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def real_time(tmp_path: Path) -> Hand:
    clock = Hand()
    clock.at_ms = tmp_path.stat().st_mtime_ns // 1_000_000
    return clock


async def test_what_was_kept_comes_back_whole_after_a_restart(tmp_path: Path, folder: Path) -> None:
    made, envelope = example(again=("failed",))
    clock = real_time(tmp_path)
    with requests(tmp_path, clock) as store:
        await store.put("name", made)
    with requests(tmp_path, clock) as store:
        assert store.get("name") == made
        assert store.get("other") is None
    assert envelope not in (folder / "name").read_bytes()
    assert str(len(envelope)) in repr(made)
    assert "ab" not in repr(made)


async def test_a_file_that_was_changed_moved_or_anothers_is_dropped(
    tmp_path: Path, folder: Path
) -> None:
    clock = real_time(tmp_path)
    with requests(tmp_path, clock) as store:
        for name in ("changed", "moved", "cut", "foreign"):
            await store.put(name, example()[0])
    data = bytearray((folder / "changed").read_bytes())
    data[-1] ^= 1
    (folder / "changed").write_bytes(data)
    (folder / "moved").rename(folder / "elsewhere")
    (folder / "cut").write_bytes(b"12")
    with requests(tmp_path, clock) as store:
        assert [store.get(name) for name in ("changed", "elsewhere", "cut")] == [None] * 3
    (tmp_path / keeping.SECRET_FILE).write_bytes(bytes(32))
    with requests(tmp_path, clock) as store:
        assert store.get("foreign") is None
    assert not names_in(folder)


async def test_the_store_is_bounded_in_number_bytes_and_age(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_KEPT", 3)
    clock = Hand()
    with requests(tmp_path, clock) as store:
        for number in range(6):
            await store.put(str(number), example()[0])
        assert names_in(folder) == ["3", "4", "5"]
        size = (folder / "3").stat().st_size
        monkeypatch.setattr(keeping, "MAX_KEPT_BYTES", 2 * size)
        await store.put("6", example()[0])
        assert names_in(folder) == ["5", "6"]
        await store.put("6", example()[0])  # sealed again: one file, counted once
        assert names_in(folder) == ["5", "6"]
        clock.at_ms = keeping.KEPT_MS + 1
        assert store.get("6") is None
    assert not names_in(folder)


async def test_requests_that_are_kept_at_once_are_bounded_too(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_KEPT", 3)
    write, disk = files.replace, threading.Event()

    def slow(path: Path, data: bytes) -> None:
        disk.wait(20)
        write(path, data)

    monkeypatch.setattr(files, "replace", slow)
    with requests(tmp_path, Hand()) as store:
        puts = [asyncio.create_task(store.put(str(n), example()[0])) for n in range(9)]
        await asyncio.sleep(0)  # each has come to the disk
        disk.set()
        await asyncio.gather(*puts)
    assert names_in(folder) == ["6", "7", "8"]


async def test_what_is_too_old_goes_without_traffic_and_at_the_start(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "SWEEP_S", 0.01)
    clock = real_time(tmp_path)
    with requests(tmp_path, clock) as store:
        store.sweep()
        await store.put("a", example()[0])
        clock.at_ms += keeping.KEPT_MS + 60_000
        for _ in range(1000):
            if not names_in(folder):
                break
            await asyncio.sleep(0.01)
        assert not names_in(folder)
        await store.put("b", example()[0])
    assert names_in(folder) == ["b"]
    with requests(tmp_path, clock):
        assert not names_in(folder)


async def test_a_file_of_the_future_is_no_younger_than_one_of_now(
    tmp_path: Path, folder: Path
) -> None:
    clock = real_time(tmp_path)
    with requests(tmp_path, clock) as store:
        await store.put("a", example()[0])
    clock.at_ms -= 10 * keeping.KEPT_MS  # the clock was put back
    with requests(tmp_path, clock) as store:
        clock.at_ms += keeping.KEPT_MS + 1
        assert store.get("a") is None
    assert not names_in(folder)


async def test_a_full_disk_costs_the_memory_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with requests(tmp_path, Hand()) as store:
        monkeypatch.setattr(files, "replace", full)
        await store.put("name", example()[0])
        assert store.get("name") is None


def test_names_differ_by_client_caller_and_key(tmp_path: Path) -> None:
    clock = Hand()
    names = set()
    for at in (None, tmp_path, tmp_path / "other"):
        with requests(at, clock) as store:
            made = [store.name(*who) for who in ("ak", "bk", "al")]
        with requests(at, clock) as store:
            assert [store.name(*who) for who in ("ak", "bk", "al")] == made
        names.update(made)
    assert len(names) == 9
    assert all(len(name) == 64 for name in names)


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    state_dir = tmp_path / "new" / "state"
    first = load_secret(state_dir, RANDOM)
    assert load_secret(state_dir, RANDOM) == first
    assert len(first) == 32
    assert [file.name for file in state_dir.iterdir()] == [keeping.SECRET_FILE]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    load_secret(tmp_path, RANDOM)
    secret = tmp_path / keeping.SECRET_FILE
    secret.chmod(mode)
    for _ in range(2):  # a refused one holds no directory
        with pytest.raises(ConfigurationError, match=f"others may read {secret}; chmod 600 it"):
            KeptRequests(tmp_path, clock=Hand(), randomness=RANDOM)
    secret.chmod(0o600)
    KeptRequests(tmp_path, clock=Hand(), randomness=RANDOM).close()


def test_no_file_has_its_name_before_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "name", list[tuple[str, bool]]()
    sync = os.fsync

    def seen(descriptor: int) -> None:
        what = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert what.is_dir() or what.read_bytes() == b"secret"
        synced.append((what.name, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    files.replace(path, b"secret")
    assert synced == [("name.new", False), (tmp_path.name, True)]
    assert [file.name for file in tmp_path.iterdir()] == ["name"]


def test_a_state_directory_is_held_by_one_client_even_of_another_process(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom cocoon.client.files import HeldFolder\n"
        "from cocoon.kernel.errors import ConfigurationError\n"
        "try:\n    HeldFolder(Path(sys.argv[1]))\nexcept ConfigurationError as error:\n"
        "    sys.exit(error.message)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with requests(tmp_path, Hand()) as store:
        other = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert other.returncode == 1
        assert other.stderr.startswith(f"another client uses the state directory {tmp_path};")
        store.close()
        subprocess.run(command, timeout=60, check=True)
    subprocess.run(command, timeout=60, check=True)  # one that ended without release held it
