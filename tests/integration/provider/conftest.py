"""One network around one agent per test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.provider_world import ProviderWorld, provider_world
from tests.support.servers import Bus


@pytest.fixture
async def world(bus: Bus, tmp_path: Path) -> AsyncIterator[ProviderWorld]:
    async with provider_world(bus, tmp_path) as running:
        yield running
