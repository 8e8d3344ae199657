"""Every fuzz target by its name: a callable that takes any bytes and raises for a finding only.

A finding is an error outside the documented classes, or a broken property (AssertionError).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.fuzz import contract_targets, evidence_targets, reply_targets, sealing_targets

CORPUS: Final = Path(__file__).parent / "corpus"
MAX_INPUT_BYTES: Final = 64 * 1024
TARGETS: Final[dict[str, Callable[[bytes], Any]]] = {
    **sealing_targets.TARGETS,
    **contract_targets.TARGETS,
    **evidence_targets.TARGETS,
    **reply_targets.TARGETS,
}

# whose inputs are JSON, and what stands between two texts of it
JSON_TARGETS: Final[dict[str, bytes | None]] = {
    **dict.fromkeys(
        ("canonical_json", "event", "command", "message", "chat_request", "collateral",
         "provider_evidence", "event_log", "policy", "trust_file", "openai_body", "client_body",
         "model_manifest", "completion_request", "embedding_request", "openai_completion",
         "openai_embeddings", "callout")
    ),
    "openai_stream": b"\n",
    "client_stream": b"\0",
}  # fmt: skip


def seeds(name: str) -> list[Path]:
    """The committed inputs of a target, in a fixed order."""
    return sorted((CORPUS / name).iterdir())
