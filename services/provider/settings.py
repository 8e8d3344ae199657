"""The agent's configuration: a file with all its models, or variables alone for one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cocoon.agent.config import AgentConfig, read_config, sentences
from cocoon.contracts.base import Region
from cocoon.kernel.errors import ConfigurationError
from cocoon.models.kept import load

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "models" / "skills-1"
_Price = Annotated[int, Field(ge=0, le=10**15)]
_Seconds = Annotated[float, Field(gt=0)]


class ProviderSettings(BaseSettings):
    """Environment variables COCOON_PROVIDER_*; times in the unit of their name's ending.

    With `config_file` the network, the agent's folders, the TEE and the models come from there.
    """

    model_config = SettingsConfigDict(
        env_prefix="COCOON_PROVIDER_", frozen=True, protected_namespaces=()
    )

    config_file: Path | None = None  # provider.toml; then nothing of the next two blocks counts

    nats_url: str | None = None
    nats_seed_file: Path | None = None  # the agent's identity key
    nats_ca_file: Path | None = None  # the authority behind the bus's certificates; None: public
    data_dir: Path | None = None
    trust_file: Path | None = None
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
    model_kind: Literal["chat", "embeddings"] = "chat"  # of a server's model
    backend_url: str | None = None
    backend_model: str | None = None  # the server's own name of the model; None: model_name
    backend_api_key_file: Path | None = None
    backend_ca_file: Path | None = None  # what the server's certificate is checked against
    backend_client_cert_file: Path | None = None  # ours, for a server that asks for one
    backend_client_key_file: Path | None = None
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
    drain_s: _Seconds = 30.0  # running jobs finish within it
    flush_s: Annotated[float, Field(ge=0)] = 10.0  # then the network has their results, or later
    grace_s: Annotated[float, Field(ge=0)] = 120.0  # jobs matched before a change are taken so long
    heartbeat_s: _Seconds = 1.0
    standing_s: _Seconds = 15.0  # how often it asks how the network sees it
    submit_backoff_s: _Seconds = 2.0
    lease_hold_s: Annotated[float, Field(ge=0)] = 600.0  # heartbeats name unsettled results so long
    spool_max_items: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    spool_max_bytes: Annotated[int, Field(ge=2**20)] = 1024 * 1024 * 1024
    job_max_bytes: Annotated[int, Field(ge=2**16, le=2**26)] = 16 * 1024 * 1024  # of one answer

    observe_host: str = "127.0.0.1"
    observe_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    otlp_endpoint: str | None = None
    log_level: str = "info"

    @model_validator(mode="after")
    def _file_or_variables(self) -> Self:
        needed = ("nats_url", "nats_seed_file", "data_dir", "trust_file")
        missing = [name for name in needed if getattr(self, name) is None]
        if self.config_file is None and missing:
            raise ValueError(f"without config_file these are needed: {', '.join(missing)}")
        return self

    def config(self) -> AgentConfig:
        """The file's, or the one model that the variables describe. Raises ConfigurationError."""
        if self.config_file is not None:
            return read_config(self.config_file)
        if self.dev_authority_file is not None and self.environment != "dev":
            raise ConfigurationError(
                "a DEV ONLY authority simulates the TEE, but the environment is prod; leave "
                "COCOON_PROVIDER_DEV_AUTHORITY_FILE out, or set COCOON_PROVIDER_ENVIRONMENT=dev"
            )
        try:
            return AgentConfig.model_validate(self._document())
        except ValidationError as error:
            said = "; ".join(sentences(error))
            raise ConfigurationError(
                f"the variables COCOON_PROVIDER_* are not taken: {said}"
            ) from None

    def _document(self) -> dict[str, Any]:
        tee: dict[str, Any] = {"kind": self.tee_kind or "tdx"}
        if self.dev_authority_file is not None and self.tee_kind is None:
            tee = {
                "kind": "simulated",
                "dev_authority_file": self.dev_authority_file.absolute(),
                "dev_platform_file": _absolute(self.dev_platform_file),
            }
        return {
            "network": {
                "bus": (self.nats_url,),
                "trust_file": _absolute(self.trust_file),
                "policy_file": _absolute(self.policy_file),
                "ca_file": _absolute(self.nats_ca_file),
            },
            "agent": {
                "seed_file": _absolute(self.nats_seed_file),
                "data_dir": _absolute(self.data_dir),
                "environment": self.environment,
                "region": self.region or None,
            },
            "tee": tee,
            "models": [self._model()],
        }

    def _model(self) -> dict[str, Any]:
        manifest = self.model_manifest_file
        named = "model_name" in self.model_fields_set or manifest is None
        model: dict[str, Any] = {
            "name": self.model_name if named or manifest is None else load(manifest).name,
            "folder": _absolute(self.model_dir) if "model_dir" in self.model_fields_set else None,
            "manifest_file": _absolute(manifest),
            "concurrency": self.concurrency,
            "price": {
                "input": self.input_nanoton_per_mtok,
                "cached_input": self.cached_input_nanoton_per_mtok,
                "output": self.output_nanoton_per_mtok,
            },
        }
        if "model_kind" in self.model_fields_set:
            model["kind"] = self.model_kind
        if self.backend_url is None:
            return model
        grpc = urlsplit(self.backend_url).scheme in ("grpc", "grpcs")
        return model | {
            "engine": "triton" if grpc else "openai",
            "url": self.backend_url,
            "served_as": self.backend_model,
            "api_key_file": _absolute(self.backend_api_key_file),
            "ca_file": _absolute(self.backend_ca_file),
            "client_cert_file": _absolute(self.backend_client_cert_file),
            "client_key_file": _absolute(self.backend_client_key_file),
            "metrics_url": self.backend_metrics_url,
            "context_tokens": self.backend_context_tokens,
            "capabilities": self.backend_capabilities,
            "quantisation": self.backend_quantisation,
            "read_timeout_s": self.backend_read_timeout_s,
        }


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
