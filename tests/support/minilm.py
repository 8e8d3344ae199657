"""The real all-MiniLM-L6-v2 for tests; skipped, with the reason, where it cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from cocoon.devnet import minilm
from cocoon.kernel.errors import ConfigurationError


def need_minilm() -> Path:
    """The model's folder, built once; or skip saying why."""
    try:
        minilm.install(lambda _: None)
    except ConfigurationError as error:
        pytest.skip(f"no MiniLM here: {error.message}")
    return minilm.FOLDER
