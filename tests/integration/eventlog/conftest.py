"""What the tests of the log share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cocoon.eventlog.append import LogAppender
from tests.support.servers import Database


@pytest.fixture
async def appender(database: Database) -> AsyncIterator[LogAppender]:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    yield writer
    await writer.close()
