"""The gateway's configuration, read once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.gateway.actions import Timing

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Limit = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=1, le=1 << 40)]


class GatewaySettings(BaseSettings):
    """Environment variables COCOON_GATEWAY_*; units are in the names' endings."""

    model_config = SettingsConfigDict(env_prefix="COCOON_GATEWAY_", frozen=True)

    nats_url: str
    nats_seed_file: Path | None = None
    postgres_dsn_file: Path
    listen_host: str = "127.0.0.1"
    listen_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    observe_host: str = "127.0.0.1"
    observe_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    otlp_endpoint: str | None = None
    log_level: str = "INFO"
    account_shards: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = (1,)
    # What `GET /v1/network` tells providers of the bus.
    bus_urls: tuple[str, ...] = ()
    bus_ca_file: Path | None = None  # the authority behind its certificates, unless a public one
    public_url: str = ""  # what clients are told to connect to; empty: the address they used

    # Limits.
    max_jobs: Limit = 2_000  # in flight, all keys together
    max_jobs_per_key: Limit = 64
    max_unmatched_jobs: Limit = 512  # asked of a shard's matcher and not answered yet
    buffer_bytes: Bytes = 512 * 1024 * 1024  # sealed bytes in memory, all together
    buffer_per_key_bytes: Bytes = 128 * 1024 * 1024
    max_reads: Limit = 256  # GET and DELETE being answered to keys
    max_reads_per_key: Limit = 16
    max_public_reads: Limit = 256  # of what needs no key: network and directory
    max_public_reads_per_address: Limit = 64  # behind a proxy all clients share its address
    max_connections: Limit = 4_000
    max_header_bytes: Limit = 32 * 1024
    job_buffer_bytes: Limit = 1024 * 1024  # frames that wait for a slow reader; then SEALED
    whole_body_bytes: Limit = 8 * 1024 * 1024  # of a response that does not stream; then SEALED
    max_fetches: Limit = 8  # chunks of SEALED fetched at once
    key_connections: Limit = 2  # to Postgres, for looking up API keys only

    # Times.
    body_timeout_s: Seconds = 30.0
    header_timeout_s: Seconds = 10.0
    keep_alive_s: Seconds = 30.0
    send_timeout_s: Seconds = 30.0
    match_timeout_s: Seconds = 2.0
    first_byte_timeout_s: Seconds = 120.0
    return_grace_s: Seconds = 3.0  # for a client that left before its first byte to come back
    stall_s: Seconds = 2.0
    job_timeout_s: Seconds = 1_800.0
    dispatch_timeout_s: Seconds = 0.25
    sealed_timeout_s: Seconds = 10.0  # how long a response may take to reach SEALED
    rpc_timeout_s: Seconds = 5.0
    directory_ttl_s: Seconds = 1.0
    key_ttl_s: Seconds = 30.0
    drain_s: Seconds = 20.0

    def timing(self) -> Timing:
        return Timing(
            repeat_ask_ms=int(self.match_timeout_s * 500),
            match_timeout_ms=int(self.match_timeout_s * 1000),
            first_byte_ms=int(self.first_byte_timeout_s * 1000),
            stall_ms=int(self.stall_s * 1000),
            job_ms=int(self.job_timeout_s * 1000),
        )

    def shard_of(self, account_id: str) -> int:
        """The account's shard: a stable hash over the configured list (keep its order)."""
        digest = hashlib.sha256(account_id.encode()).digest()
        return self.account_shards[int.from_bytes(digest[:8], "big") % len(self.account_shards)]
