"""Ids, money, canonical bytes, time and errors: standard library only, imported by everything."""
