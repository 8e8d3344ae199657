"""The quick header parser agrees with nats-py's own on everything a server can send."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client

from cocoon.bus.client import BusClient

_NAMES = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=12)
_VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)


@settings(max_examples=300)
@given(st.lists(st.tuples(_NAMES.filter(lambda name: ":" not in name), _VALUES), max_size=6))
def test_headers_are_parsed_as_nats_py_parses_them(headers: list[tuple[str, str]]) -> None:
    raw = "".join(f"{name}: {value}\r\n" for name, value in headers).encode() + b"\r\n"
    expected = {key: value.strip() for key, value in Client._parse_header_lines(raw).items()}
    assert BusClient._parse_header_lines(raw) == expected


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_parsed_without_an_error(raw: bytes) -> None:
    found = BusClient._parse_header_lines(raw)
    assert all(name.isascii() and ":" not in name for name in found)
