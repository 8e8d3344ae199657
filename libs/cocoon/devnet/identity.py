"""What a development network is made of before anything runs: keys, roots, policy, passwords.

Everything is drawn once, kept in the data folder, and marked DEV ONLY where it is a root of trust.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nacl.signing import SigningKey

from cocoon.bus.keys import public_nkey, seed_file
from cocoon.bus.permissions import matcher_name
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.nats_server import NatsUser, nats_users_for_devnet
from cocoon.evidence.policy import sign
from cocoon.evidence.trust import trust_document
from cocoon.kernel.clock import Clock

ROLES = ("billing", "attestation", "operator", "infra")  # and a matcher for each account shard
DATABASE_ROLES = ("matcher", "billing", "attestation", "gateway", "reader")


def provider_names(count: int) -> tuple[str, ...]:
    """How a network's providers are called: one is "provider", more are "provider-1" and so on."""
    return ("provider",) if count == 1 else tuple(f"provider-{n}" for n in range(1, count + 1))


@dataclass(frozen=True, slots=True)
class Identity:
    """Public facts of a development network."""

    network_id: str
    nats_users: tuple[NatsUser, ...]


def make_identity(
    folder: DataFolder, shards: Sequence[int], clock: Clock, providers: Sequence[str]
) -> Identity:
    """Make what is missing in the folder; a second call changes nothing."""
    network_id = folder.secret(
        folder.secrets / "network_id", lambda: b"dev-" + secrets.token_hex(4).encode()
    ).decode()
    if not folder.authority.exists():
        DevAuthority.create(clock.now_ms()).save(folder.authority)
    authority = DevAuthority.load(folder.authority)
    for name in providers:
        folder.provider_data(name).mkdir(exist_ok=True)
        if not folder.platform(name).exists():
            authority.platform(clock.now_ms()).save(folder.platform(name))
    signer = folder.secret(folder.secrets / "policy_signer", lambda: secrets.token_bytes(32))
    log_key = folder.secret(folder.secrets / "log_key", lambda: secrets.token_bytes(32))
    trust = dev_trust(authority, network_id, _public(signer), _public(log_key))
    folder.trust.write_bytes(trust_document(trust))
    if not folder.policy.exists():
        signed = sign(dev_policy(authority, network_id), [signer])
        folder.policy.write_bytes(signed.to_canonical())
    matchers = {shard: matcher_name(shard) for shard in shards if shard != NETWORK_SHARD}
    names = ("gateway", *ROLES, *matchers.values(), *providers)
    seeds = {name: seed_file(folder.seed(name), secrets.token_bytes(32)) for name in names}
    users = nats_users_for_devnet(
        {name: public_nkey(seeds[name]) for name in ROLES},
        [public_nkey(seeds["gateway"])],
        [public_nkey(seeds[name]) for name in providers],
        shards,
        {shard: public_nkey(seeds[name]) for shard, name in matchers.items()},
    )
    return Identity(network_id, tuple(users))


def _public(seed: bytes) -> bytes:
    return bytes(SigningKey(seed).verify_key)


def database_passwords(folder: DataFolder) -> dict[str, str]:
    """Role -> password, drawn once."""
    return {
        f"cocoon_{role}": folder.secret(
            folder.secrets / f"{role}.password", lambda: secrets.token_hex(24).encode()
        ).decode()
        for role in DATABASE_ROLES
    }
