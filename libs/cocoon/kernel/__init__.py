"""Ids, money, canonical bytes, time and errors: the standard library and msgspec only, imported by all."""
