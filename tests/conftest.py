"""Fixtures that every test may ask for by name."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.servers import bus, database, own_postgres, postgres_server

__all__ = ["bus", "database", "hearing_hangups", "own_postgres", "postgres_server"]


@pytest.fixture
def hearing_hangups() -> Iterator[None]:
    """What is started meanwhile hears a closed terminal, though the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
