"""A sealed response is read as it comes and believed only with its receipt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import SealingError
from cocoon.sealing import (
    INSIDE_CODES,
    Data,
    ErrorRecord,
    Event,
    Finished,
    Profile,
    ResponseOpener,
    ResponseSealer,
    SealedRequest,
    Status,
    Usage,
    parse_prefix,
)
from cocoon.sealing.padding import MAX_OBJECT_BYTES, RecordType, SizeRule, response_rule
from cocoon.sealing.records import Record, frame_length
from tests.support import sealing_world as world
from tests.support.sentences import says_why
from tests.unit.sealing.test_envelope import PAIRS

OUTPUT = (b'{"a":1}', b'{"b":2}', b'{"c":3}')


def read(opener: ResponseOpener, data: bytes, step: int | None = None) -> list[Event]:
    events: list[Event] = []
    for start in range(0, len(data), step or len(data) or 1):
        events += opener.feed(data[start : start + (step or len(data))])
    events_end = opener.close()
    assert events[-1] == events_end
    return events


def refusal(request: SealedRequest, data: bytes, **known: object) -> SealingError:
    opener = world.opener(request, **known)  # type: ignore[arg-type]
    with pytest.raises(SealingError, check=says_why) as refused:
        read(opener, data)
    with pytest.raises(SealingError, check=says_why) as again:  # once refused, always refused
        opener.feed(b"")
    assert again.value.code == refused.value.code in INSIDE_CODES
    assert again.value.message == refused.value.message
    return refused.value


@pytest.fixture(name="request_")
def _request() -> SealedRequest:
    return world.sealed(profile=Profile.P2, stream=True)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PAIRS),
    st.lists(st.binary(min_size=1, max_size=1500), max_size=6),
    st.integers(1, 4000),
)
def test_the_client_reads_what_the_enclave_wrote_however_it_is_cut(
    pair: tuple[Profile, bool], contents: list[bytes], step: int
) -> None:
    request = world.sealed(profile=pair[0], stream=pair[1])
    response = b"".join(world.respond(world.opened(request.envelope), contents))
    events = read(world.opener(request), response, step)
    data = [event.content for event in events if isinstance(event, Data)]
    if pair[1]:
        assert data == contents  # a stream keeps its objects apart
    assert b"".join(data) == b"".join(contents)
    assert events[-2] == Usage(world.USAGE)
    assert isinstance(events[-1], Finished)
    assert events[-1].receipt.epoch == 7


def test_a_body_larger_than_a_record_is_cut_and_joined() -> None:
    request = world.sealed()
    body = bytes(range(256)) * 600
    response = b"".join(world.respond(world.opened(request.envelope), [body]))
    events = read(world.opener(request), response, 1000)
    assert b"".join(event.content for event in events if isinstance(event, Data)) == body


def test_bytes_one_by_one(request_: SealedRequest) -> None:
    response = b"".join(world.respond(world.opened(request_.envelope), OUTPUT))
    events = read(world.opener(request_), response, 1)
    assert [event.content for event in events[:3]] == list(OUTPUT)  # type: ignore[union-attr]


def test_every_flipped_byte_of_a_response_is_refused(request_: SealedRequest) -> None:
    response = b"".join(world.respond(world.opened(request_.envelope), OUTPUT))
    for at in range(len(response)):
        flipped = bytearray(response)
        flipped[at] ^= 1 << at % 8
        refusal(request_, bytes(flipped))


def test_every_truncation_of_a_response_is_an_error_not_a_short_answer(
    request_: SealedRequest,
) -> None:
    response = b"".join(world.respond(world.opened(request_.envelope), OUTPUT))
    for end in range(len(response)):
        assert refusal(request_, response[:end]).code == "truncated", end


def test_frames_of_a_response_can_not_be_moved_dropped_repeated_or_added(
    request_: SealedRequest,
) -> None:
    head, *frames = world.respond(world.opened(request_.envelope), OUTPUT)
    one, two, three, usage, receipt = frames
    other = world.respond(world.opened(request_.envelope, seed="second run"), OUTPUT)
    for order in (
        [two, one, three, usage, receipt],
        [one, three, usage, receipt],
        [one, one, two, three, usage, receipt],
        [one, other[2], three, usage, receipt],
        [receipt],
    ):
        assert refusal(request_, head + b"".join(order)).code == "decrypt_failed"
    whole = head + b"".join(frames)
    assert refusal(request_, whole + one).code == "data_after_final"
    assert refusal(request_, whole + b"\x00").code == "data_after_final"
    assert refusal(request_, head + b"".join(frames[:-1])).code == "truncated"
    assert refusal(request_, other[0] + b"".join(frames)).code == "decrypt_failed"


def test_bytes_after_the_end_are_refused_in_a_later_chunk_too(request_: SealedRequest) -> None:
    opener = world.opener(request_)
    read(opener, b"".join(world.respond(world.opened(request_.envelope), OUTPUT)))
    with pytest.raises(SealingError, check=says_why) as refused:
        opener.feed(b"x")
    assert refused.value.code == "data_after_final"


def test_a_response_of_another_job_or_enclave_is_refused(request_: SealedRequest) -> None:
    other = world.sealed(profile=Profile.P2, stream=True, seed="other")
    theirs = b"".join(world.respond(world.opened(other.envelope), OUTPUT))
    assert refusal(request_, theirs).code == "wrong_job"
    unattested = b"".join(world.respond(world.opened(request_.envelope, index=2), OUTPUT))
    assert refusal(request_, unattested).code == "unknown_key"


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (0, b"X", "bad_magic"),
        (4, b"\x01", "bad_magic"),
        (5, b"\x02", "bad_suite"),
        (7, b"\x01", "bad_request"),
        (6, b"\x80", "bad_request"),
        (8, None, "wrong_job"),
        (24, None, "unknown_key"),
        (40, None, "wrong_job"),
        (72, bytes(32), "bad_key"),
    ],
)
def test_a_response_s_clear_part_is_checked(
    request_: SealedRequest, at: int, value: bytes | None, code: str
) -> None:
    response = bytearray(b"".join(world.respond(world.opened(request_.envelope), OUTPUT)))
    value = bytes((response[at] ^ 0xFF,)) if value is None else value
    response[at : at + len(value)] = value
    assert refusal(request_, bytes(response)).code == code


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job_id", bytes(16)),
        ("key_id", bytes(16)),
        ("model_id", bytes(32)),
        ("req_hash", bytes(32)),
        ("resp_hash", bytes(32)),
        ("prompt_commit", bytes(32)),
        ("output_commit", bytes(32)),
        ("quote_id", bytes(32)),
        ("epoch", 8),
        ("price_nanoton", 1_000_001),
        ("input_tokens", 4097),
        ("output_tokens", 1025),
        ("cached_input_tokens", 65),
        ("reasoning_tokens", 65),
    ],
)
def test_a_receipt_that_differs_in_one_field_is_not_paid(
    request_: SealedRequest, field: str, value: object
) -> None:
    response = world.respond(world.opened(request_.envelope), OUTPUT, **{field: value})
    refused = refusal(request_, b"".join(response), quote_id=world.QUOTE, epoch=7)
    assert (refused.code, refused.param) == ("receipt_mismatch", field)


@pytest.mark.parametrize(
    "counts",
    [
        {"price_nanoton": 1_000_000},
        {"input_tokens": 4096},
        {"input_tokens": 5, "output_tokens": 3},  # a stream's counts are exact
        {"output_tokens": 1024},
        {"cached_input_tokens": 64},
        {"reasoning_tokens": 64},
    ],
    ids=str,
)
def test_a_receipt_at_a_bound_of_the_header_is_taken(
    request_: SealedRequest, counts: dict[str, int]
) -> None:
    response = world.respond(world.opened(request_.envelope), OUTPUT, **counts)
    events = read(world.opener(request_, quote_id=world.QUOTE, epoch=7), b"".join(response))
    assert isinstance(events[-1], Finished)


def test_quote_and_epoch_are_compared_only_where_known(request_: SealedRequest) -> None:
    response = world.respond(world.opened(request_.envelope), OUTPUT, epoch=9, quote_id=bytes(32))
    assert read(world.opener(request_), b"".join(response))


def test_counts_under_p0_are_multiples_of_64_or_the_bound() -> None:
    request = world.sealed()
    for count, good in ((64, True), (1024, True), (65, False), (3, False), (0, True)):
        response = b"".join(
            world.respond(world.opened(request.envelope), OUTPUT, output_tokens=count)
        )
        if good:
            assert read(world.opener(request), response)
        else:
            assert refusal(request, response).param == "output_tokens"


def test_a_cut_prefix_is_truncated_and_a_flag_is_named(request_: SealedRequest) -> None:
    prefix = world.respond(world.opened(request_.envelope), OUTPUT)[0][:104]
    parsed = parse_prefix(prefix)
    assert parsed.encode() == prefix
    assert (parsed.job_id, parsed.req_hash) == (world.JOB, request_.secrets.req_hash)
    assert parsed.key_id == world.recipients()[1].key_id
    for raw, code, param in (
        (prefix[:-1], "truncated", None),
        (prefix[:7] + b"\1" + prefix[8:], "bad_request", "flags"),
        (prefix[:5] + b"\2" + prefix[6:], "bad_suite", None),
        (prefix[:4] + b"\1" + prefix[5:], "bad_magic", None),
        (b"X" + prefix[1:], "bad_magic", None),
    ):
        with pytest.raises(SealingError, check=says_why) as refused:
            parse_prefix(raw)
        assert (refused.value.code, refused.value.param) == (code, param)


def test_a_receipt_signed_by_another_key_is_refused(request_: SealedRequest) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    start = sealer.prefix() + sealer.data(b"{}")
    good = world.signed_receipt(sealer)
    forged = bytearray(good)
    forged[-1] ^= 1
    assert refusal(request_, start + sealer.finish(bytes(forged))).code == "receipt_sig"


def test_a_final_frame_that_is_no_receipt_is_refused(request_: SealedRequest) -> None:
    for kind in (RecordType.DATA, RecordType.PAD, RecordType.USAGE, RecordType.ERROR):
        sealer = ResponseSealer(world.opened(request_.envelope))
        frame = sealer._frames.seal(kind, b"", final=True)
        assert refusal(request_, sealer.prefix() + frame).code == "no_receipt"
    sealer = ResponseSealer(world.opened(request_.envelope))
    old = sealer._frames.seal(RecordType.RECEIPT, bytes(368), final=True)
    assert refusal(request_, sealer.prefix() + old).code == "no_receipt"


def test_a_receipt_that_is_not_final_is_refused(request_: SealedRequest) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    receipt = world.signed_receipt(sealer)
    early = sealer._frames.seal(RecordType.RECEIPT, receipt)
    assert refusal(request_, sealer.prefix() + early).code == "bad_tag"


def test_a_receipt_in_the_middle_of_an_object_is_refused(request_: SealedRequest) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    part = sealer._frames.seal(RecordType.PART, b'{"half":')
    sealer._hash.update(part)
    end = sealer.finish(world.signed_receipt(sealer))
    assert refusal(request_, sealer.prefix() + part + end).code == "bad_tag"


def test_usage_and_error_come_once_and_pads_are_silent(request_: SealedRequest) -> None:
    for kind in (RecordType.USAGE, RecordType.ERROR):
        sealer = ResponseSealer(world.opened(request_.envelope))
        twice = sealer._frames.seal(kind, b"{}") + sealer._frames.seal(kind, b"{}")
        assert refusal(request_, sealer.prefix() + twice).code == "bad_tag"
    sealer = ResponseSealer(world.opened(request_.envelope))
    talking = sealer._frames.seal(RecordType.PAD, b"hidden")
    assert refusal(request_, sealer.prefix() + talking).code == "bad_padding"


def test_an_error_from_inside_comes_with_its_receipt(request_: SealedRequest) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    long_error = b'{"error":"%b"}' % (b"e" * 2000)
    data = sealer.prefix() + sealer.pad() + sealer.data(OUTPUT[0]) + sealer.error(long_error)
    data += sealer.finish(world.signed_receipt(sealer, status=Status.FAILED))
    first, error, end = read(world.opener(request_), data)
    assert (first, error) == (Data(OUTPUT[0]), ErrorRecord(long_error))
    assert isinstance(end, Finished)
    assert end.receipt.status is Status.FAILED


def test_an_object_over_the_bound_is_neither_sealed_nor_collected(
    request_: SealedRequest,
) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    with pytest.raises(SealingError, check=says_why) as refused:
        sealer.data(bytes(MAX_OBJECT_BYTES + 1))
    assert refused.value.code == "record_too_large"
    parts = [
        sealer._frames.seal(RecordType.PART, bytes(509)) for _ in range(MAX_OBJECT_BYTES // 509 + 1)
    ]
    assert refusal(request_, sealer.prefix() + b"".join(parts)).code == "record_too_large"


def test_a_response_over_the_bound_is_refused(
    request_: SealedRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = b"".join(world.respond(world.opened(request_.envelope), OUTPUT * 5))
    monkeypatch.setattr("cocoon.sealing.opener.MAX_RESPONSE_BYTES", len(response))
    assert read(world.opener(request_), response, 100)
    monkeypatch.setattr("cocoon.sealing.opener.MAX_RESPONSE_BYTES", len(response) - 1)
    assert refusal(request_, response).code == "record_too_large"


@pytest.mark.parametrize(
    ("profile", "stream", "sizes"),
    [
        (Profile.P0, False, {128, 512, 2048, 8192, 32768}),
        (Profile.P1, True, {256}),
        (Profile.P2, True, {128, 512}),
    ],
)
def test_a_response_s_frames_tell_only_their_bucket(
    profile: Profile, stream: bool, sizes: set[int]
) -> None:
    request = world.sealed(profile=profile, stream=stream)
    for size in (1, 124, 125, 126, 253, 254, 509, 510, 2045, 2046, 9000, 40_000):
        frames = world.respond(world.opened(request.envelope), [b"x" * size])
        assert {len(frame) - 21 for frame in frames[1:-1]} <= sizes
        assert len(frames[-1]) - 21 == 512


def test_usage_of_any_usual_length_looks_alike() -> None:
    for profile, stream in ((Profile.P0, False), (Profile.P2, True)):
        request = world.sealed(profile=profile, stream=stream)
        lengths = {
            len(ResponseSealer(world.opened(request.envelope)).usage(b"u" * size))
            for size in (1, 60, 200, 500)
        }
        assert lengths == {512 + 21}


def test_records_outside_the_profile_are_refused() -> None:
    """An enclave (or whoever stole its keys) can not widen the channel that sizes are."""
    request = world.sealed(profile=Profile.P2, stream=True)
    opened = world.opened(request.envelope)
    for loose in (Profile.P0, Profile.P3):
        wide = replace(opened, header=replace(opened.header, flags=world.header().flags))
        if loose is Profile.P3:
            flags = world.header(profile=Profile.P3, stream=True).flags
            wide = replace(opened, header=replace(opened.header, flags=flags))
        sealer = ResponseSealer(wide)
        assert refusal(request, sealer.prefix() + sealer.data(b"x" * 700)).code == "bad_padding"


def test_nothing_can_follow_the_final_frame(request_: SealedRequest) -> None:
    sealer = ResponseSealer(world.opened(request_.envelope))
    with pytest.raises(ValueError, match="420", check=says_why):
        sealer.finish(b"short")
    sealer.finish(world.signed_receipt(sealer))
    with pytest.raises(ValueError, match="final frame", check=says_why):
        sealer.data(b"more")


def test_a_frame_has_a_least_and_a_greatest_length() -> None:
    for length in (20, 32_785):
        assert frame_length(b"xx" + length.to_bytes(4, "big"), 2) == length
    for length, code in ((19, "truncated"), (0, "truncated"), (32_786, "record_too_large")):
        with pytest.raises(SealingError, check=says_why) as refused:
            frame_length(length.to_bytes(4, "big"), 0)
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("rule", "kind", "content_bytes", "size"),
    [
        (response_rule(Profile.P0), RecordType.DATA, 125, 128),
        (response_rule(Profile.P0), RecordType.DATA, 126, 512),
        (response_rule(Profile.P0), RecordType.DATA, 32_765, 32_768),
        (response_rule(Profile.P0), RecordType.USAGE, 1, 512),
        (response_rule(Profile.P0), RecordType.ERROR, 509, 512),
        (response_rule(Profile.P0), RecordType.ERROR, 510, 2048),
        (response_rule(Profile.P0), RecordType.RECEIPT, 420, 512),
        (response_rule(Profile.P0), RecordType.RECEIPT, 509, 512),
        (response_rule(Profile.P1), RecordType.PAD, 0, 256),
        (response_rule(Profile.P1), RecordType.DATA, 253, 256),
        (response_rule(Profile.P2), RecordType.DATA, 1, 128),
        (response_rule(Profile.P2), RecordType.USAGE, 1, 512),
        (response_rule(Profile.P3), RecordType.USAGE, 1, 4),
        (response_rule(Profile.P3), RecordType.DATA, 32_765, 32_768),
    ],
)
def test_a_record_gets_the_smallest_size_that_holds_it(
    rule: SizeRule, kind: RecordType, content_bytes: int, size: int
) -> None:
    assert rule.size_for(kind, content_bytes) == size
    assert rule.allows(kind, size, content_bytes)
    assert not rule.allows(kind, size + 1, content_bytes)


@pytest.mark.parametrize(
    ("rule", "kind", "content_bytes"),
    [
        (response_rule(Profile.P0), RecordType.DATA, 32_766),
        (response_rule(Profile.P0), RecordType.RECEIPT, 510),
        (response_rule(Profile.P1), RecordType.DATA, 254),
        (response_rule(Profile.P2), RecordType.USAGE, 510),
        (response_rule(Profile.P3), RecordType.DATA, 32_766),
    ],
)
def test_what_fits_no_record_is_refused(
    rule: SizeRule, kind: RecordType, content_bytes: int
) -> None:
    with pytest.raises(SealingError, match="does not fit one record", check=says_why) as refused:
        rule.size_for(kind, content_bytes)
    assert refused.value.code == "record_too_large"


def test_what_just_fits_one_record_is_one_frame(request_: SealedRequest) -> None:
    for content, count in ((b"", 1), (b"u" * 509, 1), (b"u" * 510, 2), (b"u" * 1018, 2)):
        for seal in (ResponseSealer.usage, ResponseSealer.error, ResponseSealer.data):
            sealer = ResponseSealer(world.opened(request_.envelope))
            assert len(list(world.frames(seal(sealer, content)))) == count


def test_the_largest_object_is_sealed_and_read(request_: SealedRequest) -> None:
    largest = bytes(MAX_OBJECT_BYTES)
    response = b"".join(world.respond(world.opened(request_.envelope), [largest]))
    assert read(world.opener(request_), response)[0] == Data(largest)


def test_a_record_shows_its_kind_and_its_size() -> None:
    record = Record(RecordType.DATA, b"CANARY", final=True)
    assert repr(record) == "Record(DATA, 6 bytes, final=True)"


def test_content_never_shows_in_an_event() -> None:
    for event in (Data(b"CANARY"), Usage(b"CANARY"), ErrorRecord(b"CANARY")):
        assert "CANARY" not in repr(event)


def test_the_opener_says_how_far_it_came(request_: SealedRequest) -> None:
    response = b"".join(world.respond(world.opened(request_.envelope), OUTPUT))
    opener = world.opener(request_)
    assert opener.prefix is None
    opener.feed(response[:300])
    assert opener.received_bytes == 300
    assert opener.prefix is not None
    assert opener.prefix.job_id == world.JOB
    opener.feed(response[opener.received_bytes :])
    assert opener.received_bytes == len(response)
    assert opener.close().receipt.job_id == world.JOB
