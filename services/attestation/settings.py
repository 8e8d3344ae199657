"""Attestation's configuration, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class AttestationSettings(BaseSettings):
    """Environment variables COCOON_ATTESTATION_*; times in the unit of their name's ending."""

    model_config = SettingsConfigDict(env_prefix="COCOON_ATTESTATION_", frozen=True)

    nats_url: str
    nats_seed_file: Path
    entry_seed_file: Path  # of the user in the server's own account, who lets others in
    issuer_seed_file: Path  # signs the logins
    postgres_dsn_file: Path
    trust_file: Path  # the network's trust file: vendor roots and the policy's signers
    policy_file: Path  # the signed policy that this network runs under
    environment: Literal["dev", "prod"] = "prod"
    fee_bps: Annotated[int, Field(ge=0, le=10_000)] = 500  # as the matcher's; shown to clients
    challenge_ttl_s: Annotated[int, Field(ge=10, le=3600)] = 300
    max_providers: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    enrolments_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 60  # of new providers
    berths: Annotated[int, Field(ge=1, le=9999)] = 64  # as many as the bus was configured with
    berth_patience_s: Annotated[float, Field(ge=0)] = 86_400.0  # kept after its last login's end
    login_s: Annotated[int, Field(ge=1, le=86_400)] = 3600  # how long a login lasts at most
    lobby_s: Annotated[int, Field(ge=1, le=86_400)] = 120  # and a stranger's
    strangers_per_s: Annotated[float, Field(gt=0)] = 20.0  # into the lobby, all together
    strangers_at_once: Annotated[int, Field(ge=1)] = 100
    strangers_per_address_per_s: Annotated[float, Field(gt=0)] = 0.2  # or IPv6 network of 64 bits
    strangers_per_address: Annotated[int, Field(ge=1)] = 100  # at once
    plain_from: tuple[str, ...] = ("127.0.0.1", "::1")  # addresses that may come without TLS
    verifications: Annotated[int, Field(ge=1, le=64)] = 2  # threads that verify at once
    verifications_waiting: Annotated[int, Field(ge=0, le=4096)] = 64
    writes_per_provider: Annotated[int, Field(ge=1, le=10_000)] = 60  # in ten minutes
    heartbeat_fresh_s: Annotated[float, Field(gt=0)] = 3.0
    sweep_s: Annotated[float, Field(gt=0)] = 1.0
    evidence_kept_days: Annotated[int, Field(ge=1, le=3660)] = 90
    manifests: Annotated[int, Field(ge=1, le=1_000_000)] = 4096  # kept in all
    manifests_per_provider: Annotated[int, Field(ge=1, le=256)] = 64  # that it published
    manifests_bytes: Annotated[int, Field(ge=262_144)] = 256 * 1024 * 1024  # together
    manifests_kept_days: Annotated[int, Field(ge=1, le=3660)] = 365  # after the last offer
    observe_host: str = "127.0.0.1"
    observe_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    otlp_endpoint: str | None = None
    log_level: str = "info"
