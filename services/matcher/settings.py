"""The matcher's configuration, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class MatcherSettings(BaseSettings):
    """Environment variables COCOON_MATCHER_*; times in the unit of their name's ending."""

    model_config = SettingsConfigDict(env_prefix="COCOON_MATCHER_", frozen=True)

    nats_url: str
    nats_seed_file: Path
    postgres_dsn_file: Path
    shard: Annotated[int, Field(ge=1, le=1024)] = 1
    account_shards: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = (1,)  # of the network
    fee_bps: Annotated[int, Field(ge=0, le=10_000)] = 500
    lease_ttl_ms: Annotated[int, Field(ge=500, le=600_000)] = 10_000
    lease_limit_s: Annotated[float, Field(gt=0)] = 3600.0  # no heartbeat renews a lease for longer
    provider_silence_s: Annotated[float, Field(gt=0)] = 3.0
    cancel_grace_s: Annotated[float, Field(gt=0)] = 5.0
    sweep_s: Annotated[float, Field(gt=0)] = 0.1
    matching_policy_file: Path | None = None  # JSON as of `cocoon matching show`; None: balanced-1
    seed_period_s: Annotated[float, Field(ge=1)] = 3600.0  # one secret's, for the draws
    # of the next period: by then every decision of the former is in the log, or never will be
    seed_revealed_after_s: Annotated[float, Field(ge=10)] = 60.0
    waiting_s: Annotated[float, Field(gt=0)] = 10.0
    waiting_limit: Annotated[int, Field(ge=0)] = 1024
    waiting_limit_per_account: Annotated[int, Field(ge=0)] = 256
    observe_host: str = "127.0.0.1"
    observe_port: int = 0
    otlp_endpoint: str | None = None
    log_level: str = "INFO"
