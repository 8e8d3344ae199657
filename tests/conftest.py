"""Fixtures that every test may ask for by name."""

from __future__ import annotations

from tests.support.servers import bus, database, own_postgres, postgres_server

__all__ = ["bus", "database", "own_postgres", "postgres_server"]
