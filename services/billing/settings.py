"""Billing's configuration, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BillingSettings(BaseSettings):
    """Environment variables COCOON_BILLING_*; times in the unit of their name's ending."""

    model_config = SettingsConfigDict(env_prefix="COCOON_BILLING_", frozen=True)

    nats_url: str
    nats_seed_file: Path
    postgres_dsn_file: Path
    account_shards: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = (1,)
    result_wait_s: Annotated[float, Field(gt=0)] = 15.0  # for a match still on its way to the log
    result_workers: Annotated[int, Field(ge=1, le=4096)] = 256
    snapshot_events: Annotated[int, Field(ge=1000)] = 100_000  # between snapshots of the books
    observe_host: str = "127.0.0.1"
    observe_port: int = 0
    otlp_endpoint: str | None = None
    log_level: str = "INFO"
