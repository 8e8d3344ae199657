"""The clear header: exact layout, strict bounds, no key needed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import SealingError
from cocoon.sealing import MAX_ENVELOPE_BYTES, Profile, RequestHeader, pack_flags, parse_header
from cocoon.sealing.envelope import FIXED_BYTES, SLOT_BYTES, RecipientSlot
from tests.support import sealing_world as world
from tests.support.sentences import says_why

TAIL = bytes(24 + 4 + 20)
PAIRS = [(Profile.P0, False), (Profile.P1, True), (Profile.P2, True), (Profile.P3, False),
         (Profile.P3, True)]  # fmt: skip


def slots(count: int) -> tuple[RecipientSlot, ...]:
    return tuple(RecipientSlot(bytes([n]) * 16, bytes([n]) * 32, bytes(48)) for n in range(count))


@st.composite
def headers(draw: st.DrawFn) -> RequestHeader:
    profile, stream = draw(st.sampled_from(PAIRS))
    wide = st.binary(min_size=32, max_size=32)
    return RequestHeader(
        job_id=draw(st.binary(min_size=16, max_size=16)), model_id=draw(wide),
        max_price_nanoton=draw(st.integers(0, 2**63 - 1)),
        max_input_tokens=draw(st.integers(0, 2**32 - 1)),
        max_output_tokens=draw(st.integers(0, 2**32 - 1)),
        not_after_ms=draw(st.integers(0, 2**64 - 1)), policy_hash=draw(wide),
        flags=pack_flags(profile, stream=stream), recipients=slots(draw(st.integers(1, 8))),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(headers())
def test_every_header_comes_back_as_it_went(header: RequestHeader) -> None:
    encoded = header.encode()
    assert len(encoded) == FIXED_BYTES + SLOT_BYTES * len(header.recipients)
    assert parse_header(encoded + TAIL) == (header, len(encoded))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | st.binary(max_size=300).map(lambda tail: b"CAI1\x01\x01" + tail))
def test_arbitrary_bytes_give_a_header_or_a_refusal(data: bytes) -> None:
    try:
        header, length = parse_header(data)
    except SealingError:
        return
    assert header.encode() == data[:length]


def test_the_fixed_part_lies_where_the_specification_says() -> None:
    raw = replace(world.header(), recipients=slots(2)).encode()
    assert (FIXED_BYTES, SLOT_BYTES) == (113, 96)
    assert raw[:8] == b"CAI1\x01\x01\x00\x01"
    assert raw[8:24] == world.JOB
    assert raw[24:56] == world.MODEL
    assert struct.unpack(">QIIQ", raw[56:80]) == (1_000_000, 4096, 1024, world.NOT_AFTER_MS)
    assert raw[80:112] == world.POLICY
    assert raw[112] == 2


def test_the_gateway_reads_all_it_needs_without_a_key() -> None:
    request = world.sealed(profile=Profile.P2, stream=True)
    header, length = parse_header(request.envelope)
    assert (header.stream, header.padded, header.profile) == (True, True, Profile.P2)
    assert header.key_ids == tuple(one.key_id for one in world.recipients())
    assert length == 113 + 3 * 96


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"max_price_nanoton": 2**63}, "bad_request"),
        ({"max_price_nanoton": -1}, "bad_request"),
        ({"max_input_tokens": 2**32}, "bad_request"),
        ({"max_output_tokens": -1}, "bad_request"),
        ({"not_after_ms": 2**64}, "bad_request"),
        ({"job_id": bytes(15)}, "bad_request"),
        ({"model_id": bytes(31)}, "bad_request"),
        ({"policy_hash": bytes(33)}, "bad_request"),
        ({"recipients": ()}, "bad_request"),
        ({"recipients": slots(9)}, "bad_request"),
        ({"recipients": slots(1) * 2}, "bad_request"),
        ({"recipients": (RecipientSlot(bytes(16), bytes(32), bytes(47)),)}, "bad_request"),
        ({"suite": 2}, "bad_suite"),
        ({"flags": 1 << 6}, "bad_request"),
        ({"flags": 4 << 2 | 1}, "bad_request"),
    ],
)
def test_a_header_out_of_bounds_is_not_written(change: dict[str, object], code: str) -> None:
    header = replace(world.header(), recipients=slots(1))
    with pytest.raises(SealingError, check=says_why) as refused:
        replace(header, **change).encode()  # type: ignore[arg-type]
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (0, b"CAI2", "bad_magic"),
        (4, b"\x02", "bad_magic"),
        (5, b"\x02", "bad_suite"),
        (5, b"\x00", "bad_suite"),
        (6, b"\x80", "bad_request"),
        (7, b"\x00", "bad_request"),  # P0 without padding
        (7, b"\x03", "bad_request"),  # P0 as a stream
        (7, b"\x05", "bad_request"),  # P1 as one body
        (7, b"\x0d", "bad_request"),  # P3 with padding
        (7, b"\x10", "bad_request"),  # profile 4
        (56, b"\x80", "bad_request"),
        (112, b"\x00", "bad_request"),
        (112, b"\x09", "bad_request"),
        (112, b"\x08", "truncated"),
    ],
)
def test_a_header_out_of_bounds_is_not_read(at: int, value: bytes, code: str) -> None:
    raw = bytearray(replace(world.header(), recipients=slots(1)).encode() + TAIL)
    raw[at : at + len(value)] = value
    with pytest.raises(SealingError, check=says_why) as refused:
        parse_header(bytes(raw))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"flags": 1 << 6}, "flags"),
        ({"flags": 4 << 2 | 1}, "flags"),
        ({"flags": 0}, "flags"),
        ({"flags": 3}, "flags"),
        ({"recipients": ()}, "recipients"),
        ({"recipients": slots(9)}, "recipients"),
        ({"recipients": slots(1) * 2}, "recipients"),
        ({"max_price_nanoton": 2**63}, "max_price_nanoton"),
        ({"job_id": bytes(15)}, None),
        ({"max_input_tokens": 2**32}, None),
    ],
)
def test_a_refused_header_names_the_field(change: dict[str, object], param: str | None) -> None:
    header = replace(world.header(), recipients=slots(1))
    with pytest.raises(SealingError, check=says_why) as refused:
        replace(header, **change).encode()  # type: ignore[arg-type]
    assert refused.value.param == param


@pytest.mark.parametrize(("count", "price"), [(1, 0), (8, 2**63 - 1)])
def test_the_shortest_and_the_longest_header_are_read_with_the_shortest_tail(
    count: int, price: int
) -> None:
    header = replace(world.header(), recipients=slots(count), max_price_nanoton=price)
    encoded = header.encode()
    assert parse_header(encoded + TAIL) == (header, len(encoded))
    for cut in (encoded + TAIL[:-1], encoded, encoded[:112], b"CAI1", b"CA", b""):
        with pytest.raises(SealingError, match="is cut off", check=says_why) as refused:
            parse_header(cut)
        assert refused.value.code == "truncated"


@pytest.mark.parametrize("profile", list(Profile))
def test_only_sensible_pairs_of_profile_and_stream_exist(profile: Profile) -> None:
    for stream in (False, True):
        if (profile, stream) in PAIRS:
            flags = pack_flags(profile, stream=stream)
            header = replace(world.header(), flags=flags)
            assert (header.profile, header.stream) == (profile, stream)
        else:
            with pytest.raises(SealingError, check=says_why):
                pack_flags(profile, stream=stream)


def test_an_envelope_over_eight_mebibytes_is_neither_made_nor_read() -> None:
    with pytest.raises(SealingError, check=says_why) as made:
        world.sealed(body=bytes(MAX_ENVELOPE_BYTES))
    with pytest.raises(SealingError, check=says_why) as just_over:
        world.sealed(body=bytes(MAX_ENVELOPE_BYTES - 1000))
    with pytest.raises(SealingError, check=says_why) as read:
        parse_header(b"CAI1" + bytes(MAX_ENVELOPE_BYTES))
    codes = {made.value.code, just_over.value.code, read.value.code}
    assert codes == {"record_too_large"}
    full = world.sealed().envelope.ljust(MAX_ENVELOPE_BYTES, b"\0")
    assert parse_header(full)[0].job_id == world.JOB
