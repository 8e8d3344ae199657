"""What a development network is made of before anything runs: keys, roots, policy, passwords.

Everything is drawn once, kept in the data folder, and marked DEV ONLY where it is a root of trust.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from nacl.signing import SigningKey

from cocoon.bus.keys import (
    ACCOUNT,
    new_issuer_seed,
    nkey,
    public_nkey,
    raw_issuer_seed,
    seed_file,
)  # fmt: skip
from cocoon.bus.permissions import matcher_name
from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.nats_server import NatsUser, nats_users_for_devnet
from cocoon.devnet.private_file import write_private
from cocoon.evidence.policy import OpenTierRules, parse_policy, policy_hash, sign
from cocoon.evidence.trust import trust_document
from cocoon.kernel.clock import Clock

# and a matcher for each account shard
ROLES = ("billing", "attestation", "entry", "operator", "infra")
OPEN_TIER = OpenTierRules(
    allowed=True, max_running_jobs=4, max_job_nanoton=1_000_000_000, max_providers=16
)
DATABASE_ROLES = ("matcher", "billing", "attestation", "gateway", "reader")


def provider_names(count: int) -> tuple[str, ...]:
    """How a network's providers are called: one is "provider", more are "provider-1" and so on."""
    return ("provider",) if count == 1 else tuple(f"provider-{n}" for n in range(1, count + 1))


def open_names(count: int) -> tuple[str, ...]:
    """How its providers without a TEE are called."""
    return tuple(f"open-{n}" for n in range(1, count + 1))


@dataclass(frozen=True, slots=True)
class Identity:
    """Public facts of a development network."""

    network_id: str
    nats_users: tuple[NatsUser, ...]
    nats_issuer: str  # whose word lets providers in


def make_identity(
    folder: DataFolder, shards: Sequence[int], clock: Clock, providers: Sequence[str],
    open_providers: Sequence[str] = (),
) -> Identity:  # fmt: skip
    """Make what is missing in the folder; a second call changes nothing.

    A network from before the open tier gets a policy that allows it with its first open provider.
    """
    network_id = folder.secret(
        folder.secrets / "network_id", lambda: b"dev-" + secrets.token_hex(4).encode()
    ).decode()
    if not folder.authority.exists():
        DevAuthority.create(clock.now_ms()).save(folder.authority)
    authority = DevAuthority.load(folder.authority)
    for name in (*providers, *open_providers):
        folder.provider_data(name).mkdir(exist_ok=True)
    for name in providers:
        if not folder.platform(name).exists():
            authority.platform(clock.now_ms()).save(folder.platform(name))
    signer = folder.secret(folder.secrets / "policy_signer", lambda: secrets.token_bytes(32))
    log_key = folder.secret(folder.secrets / "log_key", lambda: secrets.token_bytes(32))
    trust = dev_trust(authority, network_id, _public(signer), _public(log_key))
    folder.trust.write_bytes(trust_document(trust))
    if not folder.policy.exists():
        signed = sign(dev_policy(authority, network_id, open_tier=OPEN_TIER), [signer])
        folder.policy.write_bytes(signed.to_canonical())
    elif open_providers:
        _open_policy(folder, signer)
    matchers = {shard: matcher_name(shard) for shard in shards if shard != NETWORK_SHARD}
    providers = (*providers, *open_providers)
    names = ("gateway", *ROLES, *matchers.values(), *providers)
    seeds = {name: seed_file(folder.seed(name), secrets.token_bytes(32)) for name in names}
    issuer = folder.secret(folder.issuer, lambda: new_issuer_seed(secrets.token_bytes(32)))
    users = nats_users_for_devnet(
        {name: public_nkey(seeds[name]) for name in ROLES},
        [public_nkey(seeds["gateway"])],
        shards,
        {shard: public_nkey(seeds[name]) for shard, name in matchers.items()},
    )
    public = nkey(ACCOUNT, _public(raw_issuer_seed(issuer)))
    return Identity(network_id, tuple(users), public)


def _open_policy(folder: DataFolder, signer: bytes) -> None:
    """Sign the next version of a policy that has no open tier yet."""
    policy = parse_policy(folder.policy.read_bytes()).policy
    if policy.open_tier is not None:
        return
    changes = {
        "version": policy.version + 1,
        "previous_hash": policy_hash(policy).hex(),
        "open_tier": OPEN_TIER,
    }
    write_private(folder.policy, sign(policy.model_copy(update=changes), [signer]).to_canonical())


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
