"""The agent's configuration, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cocoon.contracts.base import Region

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "models" / "skills-1"
_Price = Annotated[int, Field(ge=0, le=10**15)]
_Seconds = Annotated[float, Field(gt=0)]


class ProviderSettings(BaseSettings):
    """Environment variables COCOON_PROVIDER_*; times in the unit of their name's ending."""

    model_config = SettingsConfigDict(
        env_prefix="COCOON_PROVIDER_", frozen=True, protected_namespaces=()
    )

    nats_url: str
    nats_seed_file: Path  # the agent's identity key
    nats_ca_file: Path | None = None  # the authority behind the bus's certificates; None: public
    data_dir: Path
    trust_file: Path
    policy_file: Path | None = None  # None: policy.json beside the trust file
    environment: Literal["dev", "prod"] = "prod"
    tee_kind: Literal["none"] | None = None  # none: the open tier; else what the machine has
    dev_authority_file: Path | None = None  # DEV ONLY: simulate the TEE
    dev_platform_file: Path | None = None

    # the model: the embedded engine on `model_dir`, or a server at `backend_url` (https:// or on
    # loopback http:// for OpenAI-compatible ones, grpcs:// or grpc:// for Triton)
    model_name: Annotated[str, Field(min_length=1, max_length=128)] = "skills-1"
    model_dir: Path = SHIPPED_MODEL
    # None: described from the files themselves. With a server behind `backend_url`, its manifest's
    # files are those of `model_dir`, which the operator states to be what the server serves
    model_manifest_file: Path | None = None
    backend_url: str | None = None
    backend_model: str | None = None  # the server's own name of the model; None: model_name
    backend_api_key_file: Path | None = None
    backend_ca_file: Path | None = None  # Triton: what its certificate is checked against
    backend_metrics_url: str | None = None  # Triton: where it tells its load
    backend_context_tokens: Annotated[int, Field(ge=16, le=10_000_000)] = 4096
    backend_quantisation: str = "as-served"
    backend_capabilities: frozenset[
        Literal["logprobs", "logit_bias", "penalties", "seed", "json_object", "json_schema"]
    ] = frozenset({"penalties", "seed"})
    backend_read_timeout_s: _Seconds = 120.0

    # the offer, in nanoTON per million tokens
    input_nanoton_per_mtok: _Price = 20_000_000
    cached_input_nanoton_per_mtok: _Price = 10_000_000
    output_nanoton_per_mtok: _Price = 80_000_000
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 64
    region: Region = ""  # where it stands, as clients may ask for it

    epoch_s: _Seconds = 600.0
    overlap_s: _Seconds = 120.0
    evidence_s: Annotated[float, Field(ge=60)] = 7200.0
    renew_s: _Seconds = 3600.0
    job_timeout_s: _Seconds = 600.0
    drain_s: _Seconds = 30.0
    heartbeat_s: _Seconds = 1.0
    submit_backoff_s: _Seconds = 2.0
    lease_hold_s: Annotated[float, Field(ge=0)] = 600.0  # heartbeats name unsettled results so long
    spool_max_items: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    spool_max_bytes: Annotated[int, Field(ge=2**20)] = 1024 * 1024 * 1024
    job_max_bytes: Annotated[int, Field(ge=2**16, le=2**26)] = 16 * 1024 * 1024  # of one answer

    observe_host: str = "127.0.0.1"
    observe_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    otlp_endpoint: str | None = None
    log_level: str = "info"
