"""The doctor at an engine's server: whether the hop to it is private, what it writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cocoon.agent.config import ModelConfig
from services.provider.backends.making import EngineSettings
from services.provider.backends.probing import PROC, Level, probe
from services.provider.findings import Finding, State

_STATES: Final[dict[Level, State]] = {
    Level.OK: "ok", Level.UNKNOWN: "warn", Level.WRONG: "fail",
}  # fmt: skip


async def request_logging(model: ModelConfig, proc: Path = PROC) -> list[Finding]:
    """Everything that can be seen from outside; no prompt is sent."""
    settings = EngineSettings(
        engine=model.engine, kind=model.kind, folder=model.folder, url=model.url,
        model=model.served_as or model.name, context_tokens=model.context_tokens,
        api_key_file=model.api_key_file, ca_file=model.ca_file, metrics_url=model.metrics_url,
        client_cert_file=model.client_cert_file, client_key_file=model.client_key_file,
    )  # fmt: skip
    return [
        Finding(f"{one.name} ({model.name})", _STATES[one.level], one.says, one.remedy)
        for one in await probe(settings, proc=proc)
    ]
