"""Which adapter an engine gets: one function from settings to a Backend or an Embedder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cocoon.chat import Capabilities, Kind
from cocoon.kernel.clock import Randomness
from cocoon.kernel.errors import ConfigurationError
from services.provider.backends.base import Backend, Embedder, EngineLoad
from services.provider.backends.onnx import OnnxBackend
from services.provider.backends.onnx_embeddings import OnnxEmbedder
from services.provider.backends.openai_compatible import (
    OpenAICompatibleBackend,
    OpenAICompatibleEmbedder,
)

Adapter = Literal["embedded", "openai", "triton"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One model's engine. `embedded` needs `folder`, the others `url` and `model`, the server's own
    name. The three files of certificates are PEM, and for https:// and grpcs:// only.
    """

    engine: Adapter
    kind: Kind = "chat"
    folder: Path | None = None
    url: str | None = None
    model: str = ""
    context_tokens: int = 4096
    capabilities: Capabilities = field(default_factory=Capabilities)
    queue_limit: int = 64
    read_timeout_s: float = 120.0
    deadline_s: float = 600.0
    api_key_file: Path | None = None
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    metrics_url: str | None = None

    @property
    def client_cert(self) -> tuple[Path, Path] | None:
        """The agent's certificate and key. Raises ConfigurationError for one without the other."""
        pair = self.client_cert_file, self.client_key_file
        if pair[0] is None and pair[1] is None:
            return None
        if pair[0] is None or pair[1] is None:
            raise ConfigurationError(
                "a client certificate is two files, client_cert_file and client_key_file; give both"
            )
        return pair[0], pair[1]

    def api_key(self) -> str | None:
        """What the server asks for. Raises ConfigurationError."""
        if self.api_key_file is None:
            return None
        try:
            return self.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(
                f"the engine's key file {self.api_key_file} cannot be read as text"
            ) from None


def backend_for(
    settings: EngineSettings, *, randomness: Randomness, load: EngineLoad
) -> Backend | Embedder:
    """The engine, not started yet. Raises ConfigurationError for what cannot be served."""
    if settings.engine == "embedded":
        if settings.folder is None:
            raise ConfigurationError("the embedded engine loads a folder; name one")
        if settings.kind == "embeddings":
            return OnnxEmbedder(settings.folder, queue_limit=settings.queue_limit)
        return OnnxBackend(settings.folder, queue_limit=settings.queue_limit, randomness=randomness)
    if settings.url is None:
        raise ConfigurationError(f"the engine {settings.engine} is a server; give its address, url")
    shared: dict[str, Any] = {
        "context_tokens": settings.context_tokens,
        "queue_limit": settings.queue_limit,
        "read_timeout_s": settings.read_timeout_s,
        "deadline_s": settings.deadline_s,
        "api_key": settings.api_key(),
        "ca_file": settings.ca_file,
        "client_cert": settings.client_cert,
    }
    if settings.engine == "openai":
        if settings.kind == "embeddings":
            return OpenAICompatibleEmbedder(settings.url, settings.model, **shared)
        return OpenAICompatibleBackend(
            settings.url, settings.model, capabilities=settings.capabilities, **shared
        )
    if settings.kind == "embeddings":
        raise ConfigurationError(
            "embeddings are not served through Triton's tensors; serve the model with the embedded "
            "engine, or behind an OpenAI-compatible server (engine openai)"
        )
    # gRPC costs a third of a second to load: only those who use it pay
    from services.provider.backends.triton import TritonBackend

    return TritonBackend(
        settings.url, settings.model, capabilities=settings.capabilities, randomness=randomness,
        load=load, metrics_url=settings.metrics_url, **shared,
    )  # fmt: skip
