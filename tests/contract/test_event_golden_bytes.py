"""Every byte ever published decodes, and today's models write the bytes that were published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from cocoon.contracts.events import ALL_EVENTS, decode_event
from cocoon.kernel import canonical
from tests.support.event_examples import EXAMPLES, GOLDEN, golden_file

FILES = sorted(GOLDEN.glob("*.json"))
_NAME = re.compile(r"([A-Z][A-Za-z]+)\.v([1-9][0-9]*)\.json\Z")


def kind(path: Path) -> tuple[str, int]:
    match = _NAME.match(path.name)
    assert match is not None, f"{path.name} is not named <Type>.v<version>.json"
    return match[1], int(match[2])


def test_every_event_type_has_golden_bytes() -> None:
    assert {golden_file(cls) for cls in ALL_EVENTS} <= set(FILES)
    assert {type(example) for example in EXAMPLES} == set(ALL_EVENTS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.event_type)
def test_models_write_the_published_bytes(example) -> None:
    assert example.to_canonical() == golden_file(example).read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_published_version_decodes(path: Path) -> None:
    data = path.read_bytes()
    canonical.loads_object(data)  # strict: the file itself is canonical
    event = decode_event(*kind(path), data)
    if event.schema_version == kind(path)[1]:
        assert event.to_canonical() == data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_unknown_and_missing_fields_are_refused(path: Path) -> None:
    value = canonical.loads_object(path.read_bytes())
    with pytest.raises(ValidationError):
        decode_event(*kind(path), canonical.dumps({**value, "surplus": 1}))
    for name in value:
        without = {key: value[key] for key in value if key != name}
        with pytest.raises(ValidationError):
            decode_event(*kind(path), canonical.dumps(without))


def test_amounts_are_decimal_strings_and_nothing_else() -> None:
    held = golden_file(EXAMPLES[1]).read_bytes()
    assert b'"amount_nanoton":"1000000"' in held
    for bad in (b'"01"', b'"-1"', b"1.0", b'"1.0"', b"true", b'"9223372036854775808"', b'""'):
        with pytest.raises(ValidationError):
            decode_event("FundsHeld", 1, held.replace(b'"1000000"', bad))
