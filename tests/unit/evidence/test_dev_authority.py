"""The DEV ONLY authority: kept in private files, marked as what it is, believed by nobody else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.devnet.dev_platform import DevPlatform
from cocoon.evidence.tdx import verify_tdx
from cocoon.kernel.errors import ConfigurationError
from tests.support.evidence_world import NOW_MS, authority, collateral, platform, policy, trust


def test_an_authority_and_its_machine_survive_a_restart(tmp_path: Path) -> None:
    authority().save(tmp_path / "authority.json")
    platform().save(tmp_path / "platform.json")
    again = DevAuthority.load(tmp_path / "authority.json")
    machine = DevPlatform.load(tmp_path / "platform.json")
    text = again.collateral(NOW_MS - 1000)
    verdict = verify_tdx(machine.quote(bytes(64)), text, trust(), policy(), NOW_MS)
    assert verdict.ok
    assert again.anchor == authority().anchor


def test_its_files_are_private_and_say_what_they_are(tmp_path: Path) -> None:
    for item in (authority(), platform()):
        path = tmp_path / "file.json"
        item.save(path)
        item.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "DEV ONLY" in path.read_text()
        assert "PRIVATE" not in repr(item)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_every_certificate_says_dev_only() -> None:
    for certificate in (
        authority().root,
        authority().pck_ca,
        authority().tcb_signer,
        platform().certificate,
    ):
        assert "DEV ONLY" in certificate.subject.rfc4514_string()
        assert "DEV ONLY" in certificate.issuer.rfc4514_string()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"chain": 1}'])
def test_a_damaged_file_is_refused_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    for load in (DevAuthority.load, DevPlatform.load):
        with pytest.raises(ConfigurationError, match="cocoon up"):
            load(path)
        with pytest.raises(ConfigurationError, match="cocoon up"):
            load(tmp_path / "absent.json")


def test_one_dev_network_does_not_believe_another() -> None:
    other = DevAuthority.create(NOW_MS)
    others_trust = dev_trust(other, "other", bytes(32), bytes(32))
    others_policy = dev_policy(other, "other")
    quote = platform().quote(bytes(64))
    verdict = verify_tdx(quote, collateral(), others_trust, others_policy, NOW_MS)
    assert str(verdict) == "reject:unknown_root"
    swapped = verify_tdx(
        quote, other.collateral(NOW_MS - 1000), others_trust, others_policy, NOW_MS
    )
    assert str(swapped) == "reject:cert_chain"


def test_report_data_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        platform().quote(bytes(63))
