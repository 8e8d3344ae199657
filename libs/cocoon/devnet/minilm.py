"""The embeddings model all-MiniLM-L6-v2, built at first use from its published weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cocoon.devnet import installing

NAME: Final = "all-minilm-l6-v2"
FOLDER: Final = installing.CHECKOUT / ".cocoon-models" / NAME
MANIFEST: Final = installing.CHECKOUT / "models" / "minilm" / "manifest.json"


def install(say: Callable[[str], None]) -> None:
    """Build it unless it stands. Raises ConfigurationError saying why not."""
    installing.install("minilm", "all-MiniLM-L6-v2", say)
