"""Ids, money, canonical bytes, time and errors: standard library and msgspec, used by all."""
