"""Fixtures of the billing tests."""

from __future__ import annotations

from tests.support.books_world import books

__all__ = ["books"]
