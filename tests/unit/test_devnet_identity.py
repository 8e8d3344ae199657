"""What a development network is made of: a provider each, and nothing made twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from nacl.signing import SigningKey

from cocoon.bus.keys import ACCOUNT, nkey, public_nkey, raw_issuer_seed, read_seed_file
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.identity import (
    OPEN_TIER,
    ROLES,
    make_identity,
    open_names,
    provider_names,
)
from cocoon.evidence.policy import parse_policy, policy_hash, sign, verify
from cocoon.evidence.trust import load_trust
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import ConfigurationError


def contents(folder: DataFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


def test_every_provider_has_its_own_key_machine_and_folder_and_no_user_of_the_bus(
    tmp_path: Path,
) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    names = provider_names(3)
    identity = make_identity(folder, (0, 1), SystemClock(), names)

    assert names == ("provider-1", "provider-2", "provider-3")
    assert len({folder.seed(name).read_bytes() for name in names}) == 3
    assert len({folder.platform(name).read_bytes() for name in names}) == 3
    assert all(folder.provider_data(name).is_dir() for name in names)
    # the roles, one matcher, one gateway: providers come in by their own word
    assert len({user.nkey_public for user in identity.nats_users}) == len(ROLES) + 2
    providers = {public_nkey(read_seed_file(folder.seed(name))) for name in names}
    assert not providers & {user.nkey_public for user in identity.nats_users}
    issuer = bytes(SigningKey(raw_issuer_seed(folder.issuer.read_bytes())).verify_key)
    assert identity.nats_issuer == nkey(ACCOUNT, issuer)


def test_every_account_shard_has_a_matcher_that_hears_its_own_requests_only(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    identity = make_identity(folder, (0, 1, 2), SystemClock(), provider_names(1))

    matchers = [
        user.allowed for user in identity.nats_users
        if any(subject.startswith("rpc.matcher.") for subject in user.allowed.subscribe)
    ]  # fmt: skip
    assert [sorted(allowed.subscribe) for allowed in matchers] == [
        ["_INBOX_matcher.>", "hb.provider.*", "rpc.matcher.1.*"],
        ["_INBOX_matcher-2.>", "hb.provider.*", "rpc.matcher.2.*"],
    ]
    for shard, allowed in enumerate(matchers, start=1):
        streams = {word for subject in allowed.publish for word in subject.split(".")
                   if word.startswith("EVENTS_")}  # fmt: skip
        assert streams == {"EVENTS_0", f"EVENTS_{shard}"}


def test_a_folder_keeps_the_number_of_its_account_shards(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    assert (folder.account_shards(None), folder.account_shards(3)) == (1, 3)

    folder.keep_account_shards(2)

    assert folder.account_shards(None) == folder.account_shards(2) == 2
    with pytest.raises(ConfigurationError, match="was made with --shards 2"):
        folder.account_shards(1)


def test_a_folder_from_before_there_was_a_choice_has_one_account_shard(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    (folder.secrets / "network_id").write_bytes(b"dev-1")

    assert folder.account_shards(None) == 1
    with pytest.raises(ConfigurationError, match="was made with --shards 1"):
        folder.account_shards(2)


def test_a_folder_keeps_the_port_of_its_bus(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    assert folder.bus_port() == 0

    folder.keep_bus_port(21282)

    assert DataFolder(tmp_path / "net").bus_port() == 21282
    assert folder.clear()[0].count("bus_port") == 1


def test_a_second_start_makes_nothing_anew(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    first = make_identity(folder, (0, 1), SystemClock(), provider_names(1))
    made = contents(folder)

    assert make_identity(folder, (0, 1), SystemClock(), provider_names(1)) == first
    assert contents(folder) == made


def test_a_single_provider_keeps_its_plain_name() -> None:
    assert provider_names(1) == ("provider",)


def test_a_network_is_made_with_an_open_tier_and_one_from_before_gets_it_when_it_is_used(
    tmp_path: Path,
) -> None:
    folder = DataFolder(tmp_path / "net")
    folder.prepare()
    make_identity(folder, (0, 1), SystemClock(), provider_names(1))
    made = parse_policy(folder.policy.read_bytes()).policy
    assert made.open_rules == OPEN_TIER

    signer = (folder.secrets / "policy_signer").read_bytes()
    before = made.model_copy(update={"open_tier": None})
    folder.policy.write_bytes(sign(before, [signer]).to_canonical())
    make_identity(folder, (0, 1), SystemClock(), provider_names(1))
    assert parse_policy(folder.policy.read_bytes()).policy == before
    make_identity(folder, (0, 1), SystemClock(), provider_names(1), open_names(2))
    signed = parse_policy(folder.policy.read_bytes())
    trust = load_trust(folder.trust)
    assert verify(signed, trust.policy_signers, trust.policy_threshold)
    assert (signed.policy.version, signed.policy.open_rules) == (2, OPEN_TIER)
    assert signed.policy.previous_hash == policy_hash(before).hex()
    assert not folder.platform("open-1").exists()
    assert all(folder.seed(name).exists() for name in ("provider", "open-1", "open-2"))
