"""A sealed request opens for its recipients, whole and unchanged, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import (
    crypto_secretstream_xchacha20poly1305_init_push,
    crypto_secretstream_xchacha20poly1305_push,
    crypto_secretstream_xchacha20poly1305_state,
)

from cocoon.kernel.errors import SealingError
from cocoon.sealing import (
    INSIDE_CODES,
    KeyRing,
    Profile,
    Recipient,
    accept_request,
    hpke,
    open_accepted,
    open_request,
    outside_code,
    seal_request,
)
from cocoon.sealing.derive import request_keys, sha256
from cocoon.sealing.padding import BUCKETS, RecordType, request_rule
from cocoon.sealing.records import FrameSealer
from tests.support import sealing_world as world
from tests.support.sentences import says_why
from tests.unit.sealing.test_envelope import PAIRS

HEADER_BYTES = 113 + 3 * 96
FIRST_FRAME = HEADER_BYTES + 24


def try_to_open(envelope: bytes, options: dict[str, object]) -> None:
    """An enclave's three steps, as they run where the key's holder is another process."""
    secret = b"\x21" * 32
    accepted = accept_request(envelope, **options)  # type: ignore[arg-type]
    slot = accepted.slot
    exports = world.ring(1).job_exports(slot.key_id, slot.enc, accepted.fixed_header, secret)
    open_accepted(accepted, exports, resp_eph_pk=hpke.public_key(secret))


def refusal(envelope: bytes, **changes: object) -> str | None:
    options: dict[str, object] = {
        "key_ids": world.ring(1).key_ids(), "now_ms": world.NOW_MS,
        "policy_hashes": {world.POLICY}, "model_ids": {world.MODEL}, **changes,
    }  # fmt: skip
    with pytest.raises(SealingError, check=says_why) as refused:
        try_to_open(envelope, options)
    assert refused.value.code in INSIDE_CODES
    return refused.value.code


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PAIRS),
    st.binary(max_size=1000) | st.integers(0, 120_000).map(lambda size: b"x" * size),
    st.from_regex(r"[!-~]{1,64}", fullmatch=True),
    st.integers(0, 2),
)
def test_each_recipient_reads_what_the_client_wrote(
    pair: tuple[Profile, bool], body: bytes, endpoint: str, index: int
) -> None:
    request = world.sealed(profile=pair[0], stream=pair[1], body=body, endpoint=endpoint)
    opened = world.opened(request.envelope, index=index)
    assert (opened.endpoint, opened.body) == (endpoint, body)
    assert opened.header == request.secrets.header
    assert opened.req_hash == request.secrets.req_hash == sha256(request.envelope)
    assert opened.prompt_commit == request.secrets.prompt_commit


def test_every_flipped_byte_of_a_request_is_refused() -> None:
    envelope = world.sealed().envelope
    for at in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[at] ^= 1 << at % 8
        assert refusal(bytes(flipped)), at


def test_every_truncation_of_a_request_is_refused() -> None:
    envelope = world.sealed(body=b"x" * 33_000).envelope
    cuts = set(range(0, len(envelope), 997)) | set(range(len(envelope) - 200, len(envelope)))
    cuts |= set(range(FIRST_FRAME + 60)) | {FIRST_FRAME + 4 + 32_785}
    for end in sorted(cuts):
        assert refusal(envelope[:end]) == "truncated", end


def test_a_request_that_ends_within_a_frame_s_length_is_truncated() -> None:
    envelope = world.sealed(body=b"x" * 33_000).envelope
    first = envelope[: FIRST_FRAME + 4 + 32_785]
    for rest in (b"\xff", b"\xff\xff\xff", b"\x00\x00\x00\x14"):
        assert refusal(first + rest) == "truncated"


def test_frames_of_a_request_can_not_be_moved_dropped_repeated_or_added() -> None:
    envelope = world.sealed(body=b"x" * 70_000).envelope
    head, parts = envelope[:FIRST_FRAME], list(world.frames(envelope[FIRST_FRAME:]))
    assert len(parts) == 3
    first, second, last = parts
    other = list(world.frames(world.sealed(body=b"y" * 70_000, seed="b").envelope[FIRST_FRAME:]))
    for name, order in {
        "swapped": [second, first, last],
        "last first": [last, first, second],
        "middle dropped": [first, last],
        "first dropped": [second, last],
        "repeated": [first, first, second, last],
        "of another request": [first, other[1], last],
    }.items():
        assert refusal(head + b"".join(order)) == "decrypt_failed", name
    assert refusal(head + first + second) == "truncated"
    assert refusal(envelope + first) == "data_after_final"
    assert refusal(envelope + b"\x00") == "data_after_final"
    assert refusal(head + b"\x00\x00\x80\x12" + first[4:]) == "record_too_large"


def test_recipients_can_not_be_swapped_dropped_or_exchanged() -> None:
    one, two = world.sealed().envelope, world.sealed(seed="other").envelope
    slots = [one[113 + 96 * n : 209 + 96 * n] for n in range(3)]
    rest = one[HEADER_BYTES:]
    assert refusal(one[:113] + slots[1] + slots[0] + slots[2] + rest) == "decrypt_failed"
    assert refusal(one[:112] + b"\x02" + slots[0] + slots[1] + rest) == "decrypt_failed"
    assert refusal(one[:113] + slots[0] + two[209:305] + slots[2] + rest) == "decrypt_failed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"now_ms": world.NOT_AFTER_MS + 1}, "expired"),
        ({"policy_hashes": set()}, "wrong_policy"),
        ({"model_ids": set()}, "wrong_model"),
        ({"key_ids": frozenset()}, "unknown_key"),
        ({"expected_req_hash": bytes(32)}, "wrong_job"),
    ],
)
def test_an_enclave_refuses_what_it_may_not_serve(changes: dict[str, object], code: str) -> None:
    assert refusal(world.sealed().envelope, **changes) == code


def test_the_last_millisecond_still_counts() -> None:
    envelope = world.sealed().envelope
    accept_request(
        envelope, key_ids=world.ring(0).key_ids(), now_ms=world.NOT_AFTER_MS,
        policy_hashes={world.POLICY}, model_ids={world.MODEL},
        expected_req_hash=sha256(envelope),
    )  # fmt: skip


def test_an_enclave_that_was_not_named_can_not_open_it() -> None:
    envelope = world.sealed(count=2).envelope
    with pytest.raises(SealingError, check=says_why) as refused:
        world.opened(envelope, index=2)
    assert refused.value.code == "unknown_key"


def test_a_low_order_enc_is_refused() -> None:
    envelope = bytearray(world.sealed().envelope)
    envelope[113 + 96 + 16 : 113 + 96 + 48] = bytes(32)
    assert refusal(bytes(envelope)) == "bad_key"


def test_a_recipient_whose_name_is_not_its_key_is_never_sealed_to() -> None:
    good, other = world.recipients(2)
    for bad in (replace(good, key_id=other.key_id), Recipient.of(bytes(32))):
        with pytest.raises(SealingError, check=says_why) as refused:
            seal_request(
                header=world.header(), recipients=[bad], endpoint="e", body=b"",
                randomness=world.Counted(),
            )  # fmt: skip
        assert refused.value.code == "bad_key"


@pytest.mark.parametrize("endpoint", ["", "x" * 65, "naïve", "a\x00b"])
def test_an_endpoint_that_can_not_be_read_back_is_not_sealed(endpoint: str) -> None:
    with pytest.raises(SealingError, check=says_why) as refused:
        world.sealed(endpoint=endpoint)
    assert (refused.value.code, refused.value.param) == ("bad_request", "endpoint")


def test_the_longest_endpoint_is_sealed_and_read() -> None:
    endpoint = "/" + "x" * 63
    assert world.opened(world.sealed(endpoint=endpoint).envelope).endpoint == endpoint
    opened = world.opened(forged([(0, b"x" * 64 + b"\x00body", 128, True)]))
    assert opened.endpoint == "x" * 64


def test_a_body_may_hold_zero_bytes() -> None:
    request = world.sealed(endpoint="e", body=b"a\x00b\x00")
    opened = world.opened(request.envelope)
    assert (opened.endpoint, opened.body) == ("e", b"a\x00b\x00")


def test_opening_in_one_call_checks_the_hash_that_was_named_too() -> None:
    with pytest.raises(SealingError, check=says_why) as refused:
        open_request(
            world.sealed().envelope, keys=world.ring(1), resp_eph_sk=b"\x21" * 32,
            now_ms=world.NOW_MS, policy_hashes={world.POLICY}, model_ids={world.MODEL},
            expected_req_hash=bytes(32),
        )  # fmt: skip
    assert refused.value.code == "wrong_job"


def test_a_request_without_padding_is_as_long_as_its_content() -> None:
    request = world.sealed(profile=Profile.P3, endpoint="e", body=b"x" * 10, count=1)
    assert len(request.envelope) == 113 + 96 + 24 + 4 + 17 + 3 + len(b"e\x00" + b"x" * 10)


def forged(records: list[tuple[int, bytes, int, bool]]) -> bytes:
    """A request by someone who holds the content key: (type, content, size, final) records."""
    randomness = world.Counted("forger")
    request = seal_request(
        header=world.header(), recipients=world.recipients(), endpoint="e", body=b"",
        randomness=randomness,
    )  # fmt: skip
    cek = world.Counted("forger").token(32)
    head = request.envelope[:HEADER_BYTES]
    key, _ = request_keys(sha256(head), cek)

    class Loose:
        """A size rule that pads as told."""

        size = 0

        def size_for(self, kind: int, content_bytes: int) -> int:
            return self.size

    loose = Loose()
    sealer = FrameSealer(key, aad=sha256(head), rule=loose)  # type: ignore[arg-type]
    frames = []
    for kind, content, size, final in records:
        loose.size = size
        frames.append(sealer.seal(kind, content, final=final))  # type: ignore[arg-type]
    return head + sealer.header + b"".join(frames)


def test_the_forger_s_tool_makes_a_good_request_when_told_to() -> None:
    opened = world.opened(forged([(3, b"", 128, False), (0, b"e\x00body", 512, True)]))
    assert (opened.endpoint, opened.body) == ("e", b"body")


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([(0, b"e\x00body", 129, True)], "bad_padding"),  # a size outside the buckets
        ([(0, b"e\x00body", 9, True)], "bad_padding"),  # no padding where P0 was promised
        ([(3, b"hidden", 128, False), (0, b"e\x00", 128, True)], "bad_tag"),  # a pad that talks
        ([(1, b"e\x00body", 128, True)], "bad_padding"),  # a request has no receipt's size
        ([(2, b"e\x00body", 128, True)], "bad_tag"),
        ([(4, b"e\x00body", 128, True)], "bad_tag"),
        ([(5, b"e\x00body", 128, True)], "bad_tag"),
        ([(6, b"e\x00body", 128, True)], "bad_tag"),
        ([(0, b"no endpoint", 128, True)], "bad_request"),
        ([(0, b"\x00body", 128, True)], "bad_request"),
        ([(0, b"x" * 65 + b"\x00body", 128, True)], "bad_request"),
        ([(0, b"\xff\x00body", 128, True)], "bad_request"),
        ([(0, b"e\x00", 128, False)], "truncated"),
    ],
)
def test_even_a_holder_of_the_key_gets_only_well_formed_requests_in(
    records: list[tuple[int, bytes, int, bool]], code: str
) -> None:
    assert refusal(forged(records)) == code


def test_a_request_without_an_endpoint_is_told_so() -> None:
    with pytest.raises(SealingError, check=says_why) as refused:
        world.opened(forged([(0, b"no endpoint", 128, True)]))
    assert refused.value.param == "endpoint"


def raw_request(record: bytes, tag: int) -> bytes:
    """A request of one record, byte for byte as given, under any secretstream tag."""
    head = forged([(0, b"e\x00", 128, True)])[:HEADER_BYTES]
    key, _ = request_keys(sha256(head), world.Counted("forger").token(32))
    state = crypto_secretstream_xchacha20poly1305_state()
    stream_header = crypto_secretstream_xchacha20poly1305_init_push(state, key)
    ciphertext = crypto_secretstream_xchacha20poly1305_push(state, record, sha256(head), tag)
    return head + stream_header + len(ciphertext).to_bytes(4, "big") + ciphertext


def test_padding_is_zeros_and_a_length_stays_inside_its_record() -> None:
    good = b"\x00\x00\x02e\x00".ljust(128, b"\x00")
    assert world.opened(raw_request(good, 3)).endpoint == "e"
    for at in (5, 6, 127):
        bad = bytearray(good)
        bad[at] = 1
        assert refusal(raw_request(bytes(bad), 3)) == "bad_padding"
    assert refusal(raw_request(b"\x00\x00\x7e" + good[3:], 3)) == "bad_padding"


@pytest.mark.parametrize("tag", [1, 2])
def test_only_the_message_and_final_tags_are_spoken(tag: int) -> None:
    assert refusal(raw_request(b"\x00\x00\x02e\x00".ljust(128, b"\x00"), tag)) == "bad_tag"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 140_000))
def test_a_request_s_size_tells_only_its_bucket(size: int) -> None:
    envelope = world.sealed(body=b"x" * size, endpoint="e", count=1).envelope
    content = size + 2
    full, rest = divmod(content, BUCKETS[-1] - 3)
    records = [BUCKETS[-1]] * full
    if rest or not full:
        records.append(next(bucket for bucket in BUCKETS if rest + 3 <= bucket))
    assert len(envelope) == 113 + 96 + 24 + sum(21 + record for record in records)


def test_two_prompts_of_one_bucket_look_alike() -> None:
    assert len(world.sealed(body=b"a").envelope) == len(world.sealed(body=b"a" * 90).envelope)


def test_secrets_and_content_never_show() -> None:
    request = world.sealed(body=b"CANARY-PROMPT")
    opened = world.opened(request.envelope)
    shown = repr(request) + repr(opened) + repr(world.ring(0)) + repr(opened.response_secret)
    assert repr(opened.response_secret) == "JobExports(<secret>)"
    secrets = request.secrets
    for hidden in (
        b"CANARY-PROMPT", secrets.commit_key, *(one.eph_sk for one in secrets.by_key_id.values()),
        *(one.response_export for one in secrets.by_key_id.values()),
        opened.response_secret.wrap_key, opened.commit_key, *world.SECRETS,
    ):  # fmt: skip
        assert repr(hidden)[2:-1] not in shown
        assert hidden.hex() not in shown


def test_the_key_s_holder_gives_job_keys_only_for_keys_it_holds() -> None:
    ring = KeyRing()
    with pytest.raises(SealingError, check=says_why) as refused:
        ring.job_exports(bytes(16), bytes(32), bytes(113), b"\x01" * 32)
    assert refused.value.code == "unknown_key"


@pytest.mark.parametrize("code", sorted(INSIDE_CODES))
def test_the_outside_hears_coarse_codes_only(code: str) -> None:
    coarse = {"bad_request", "unknown_key", "wrong_policy", "expired", "busy"}
    assert outside_code(code) in coarse
    assert outside_code(code) == (code if code in coarse else "bad_request")


def test_request_records_keep_to_the_profile() -> None:
    assert request_rule(Profile.P3).size_for(RecordType.DATA, 5) == 8
    assert request_rule(Profile.P0).size_for(RecordType.DATA, 5) == 128
