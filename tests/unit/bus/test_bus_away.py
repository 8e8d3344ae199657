"""A bus that is away is tried four times a second; the log of an agent must not grow by that."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cocoon.bus.connection import connect
from cocoon.bus.keys import seed_file
from cocoon.devnet.ports import free_port
from cocoon.kernel.errors import Unavailable


async def test_a_bus_that_is_away_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed_file(tmp_path / "seed", bytes(32))
    with caplog.at_level(logging.WARNING), pytest.raises(Unavailable):
        await connect(
            [f"nats://127.0.0.1:{free_port()}"], tmp_path / "seed", "one", "_INBOX", timeout_s=1.5
        )
    assert [record.getMessage() for record in caplog.records].count("bus error") == 1
