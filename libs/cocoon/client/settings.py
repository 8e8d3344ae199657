"""The sidecar's settings: COCOON_SIDECAR_* in the environment, or the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from cocoon.client.network import NetworkOptions
from cocoon.contracts.matching import Preferences
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import ConfigurationError
from cocoon.sealing import Profile

DEFAULT_PORT = 8642
Padding = Literal["P0", "P1", "P2", "P3"]


class SidecarSettings(BaseSettings):
    """Read once. `api_key` or `api_key_file`; without either, callers bring their own key.

    listen_port 0 takes any free port. local_key: what local programs must send as their API key.
    state_dir keeps what must never go back (collateral floors, policy version).
    """

    model_config = SettingsConfigDict(
        env_prefix="COCOON_SIDECAR_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    gateway_url: str
    trust_file: Path
    api_key: SecretStr | None = None
    api_key_file: Path | None = None
    local_key: SecretStr | None = None
    state_dir: Path | None = None
    listen_host: Literal["127.0.0.1", "::1", "localhost"] = "127.0.0.1"
    listen_port: Annotated[int, Field(ge=0, le=65_535)] = DEFAULT_PORT
    tiers: tuple[Assurance, ...] | None = None
    body_padding: Padding = "P0"
    stream_padding: Padding = "P2"
    max_price_nanoton: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    model_pins: dict[str, str] = {}
    provider: Preferences | None = None  # JSON: the wishes of requests that have none of their own
    tokenizers: dict[str, Path] = {}  # model names to folders with their tokenizer.json
    otlp_endpoint: str | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    def network_options(self) -> NetworkOptions:
        """Raises ConfigurationError when the key file cannot be read."""
        return NetworkOptions(
            gateway_url=self.gateway_url,
            trust=self.trust_file,
            api_key=self._api_key(),
            state_dir=self.state_dir,
            assurances=self.tiers,
            body_profile=Profile[self.body_padding],
            stream_profile=Profile[self.stream_padding],
            max_price_nanoton=self.max_price_nanoton,
            model_pins=self.model_pins,
            wishes=self.provider,
            tokenizers=self.tokenizers,
            local_key=self.local_key.get_secret_value() if self.local_key else None,
        )

    def _api_key(self) -> str | None:
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        if self.api_key_file is None:
            return None
        try:
            return self.api_key_file.read_text().strip()
        except OSError as error:
            raise ConfigurationError(
                f"the key file {self.api_key_file} cannot be read ({error.strerror})"
            ) from None
