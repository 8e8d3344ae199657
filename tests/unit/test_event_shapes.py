"""A check of stored bytes refuses exactly what the event's own decoder refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from cocoon.contracts.events import EventData, decoder
from cocoon.contracts.shapes import MAX_KNOWN, checker, reader
from tests.support.event_examples import EXAMPLES

ODD = b'gG09af" \\-+.{}[]:,\n\x00\xc3'  # letters beyond hex, signs, JSON's own, no ASCII


def is_refused(read: Callable[[bytes], object], data: bytes) -> bool:
    try:
        read(data)
    except ValueError:
        return True
    return False


def changed(data: bytes) -> Iterator[bytes]:
    """Every byte replaced, doubled, left out, and every cut."""
    for at in range(len(data)):
        for odd in ODD:
            yield data[:at] + bytes([odd]) + data[at + 1 :]
        yield data[:at] + data[at : at + 1] + data[at:]
        yield data[:at] + data[at + 1 :]
        yield data[:at]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.event_type)
def test_a_check_refuses_what_the_decoder_refuses(event: EventData) -> None:
    check = checker(event.event_type, event.schema_version)
    decode = decoder(event.event_type, event.schema_version)
    data = event.to_canonical()
    check(data)  # from now on its frame is known
    for wrong in changed(data):
        assert is_refused(check, wrong) == is_refused(decode, wrong), wrong
    check(data)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.event_type)
def test_what_is_read_has_the_events_fields(event: EventData) -> None:
    read, data = reader(event.event_type, event.schema_version), event.to_canonical()
    assert read(data) == event  # by its own decoder; from now on its frame is known
    found = read(data)
    for name, value in json.loads(data).items():
        if isinstance(value, str | int):
            assert str(getattr(found, name)) == str(value), name


HELD = b'{"account_id":"acct_1","amount_nanoton":"%s","job_id":"%s"}'


@pytest.mark.parametrize(
    ("amount", "job_id"),
    [
        (b"ab", b"0f" * 16),
        (b"007", b"0f" * 16),
        (b"", b"0f" * 16),
        (b"9223372036854775808", b"0f" * 16),
        (b"1", b"0f" * 15),
        (b"1", rb"\u0047" + b"0" * 31),
    ],
)
def test_a_known_frame_excuses_nothing(amount: bytes, job_id: bytes) -> None:
    check = checker("FundsHeld", 1)
    check(HELD % (b"12", b"0f" * 16))
    check(HELD % (b"1", rb"\u0061" + b"0" * 31))  # an escaped "a" is one: it decodes
    with pytest.raises(ValueError, match=r"validation error"):
        check(HELD % (amount, job_id))


def test_many_names_do_not_grow_what_is_known() -> None:
    check = reader("FundsHeld", 1)
    for number in range(MAX_KNOWN + 10):
        name = "".join(chr(ord("g") + int(digit)) for digit in str(number))
        check(HELD.replace(b"acct_1", name.encode()) % (b"1", b"0f" * 16))
    known = next(c.cell_contents for c in check.__closure__ or () if type(c.cell_contents) is set)
    assert 0 < len(known) <= MAX_KNOWN


def test_an_unknown_type_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        checker("NoSuchEvent", 1)
