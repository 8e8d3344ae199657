"""What a development network is made of: a provider each, and nothing made twice."""

from __future__ import annotations

from pathlib import Path

from cocoon.devnet.folder import DataFolder
from cocoon.devnet.identity import ROLES, make_identity, provider_names
from cocoon.kernel.clock import SystemClock


def contents(folder: DataFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


def test_every_provider_has_its_own_key_machine_folder_and_user(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    names = provider_names(3)
    identity = make_identity(folder, (0, 1), SystemClock(), names)

    assert names == ("provider-1", "provider-2", "provider-3")
    assert len({folder.seed(name).read_bytes() for name in names}) == 3
    assert len({folder.platform(name).read_bytes() for name in names}) == 3
    assert all(folder.provider_data(name).is_dir() for name in names)
    assert len({user.nkey_public for user in identity.nats_users}) == len(ROLES) + 3
    own = [user.allow_subscribe for user in identity.nats_users][-3:]
    assert len(set(own)) == 3


def test_a_second_start_makes_nothing_anew(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    first = make_identity(folder, (0, 1), SystemClock(), provider_names(1))
    made = contents(folder)

    assert make_identity(folder, (0, 1), SystemClock(), provider_names(1)) == first
    assert contents(folder) == made


def test_a_single_provider_keeps_its_plain_name() -> None:
    assert provider_names(1) == ("provider",)
