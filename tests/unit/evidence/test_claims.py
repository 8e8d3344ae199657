"""The claims codec and the hashes around it, against known answers and against noise."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.evidence import claims as binding
from cocoon.evidence.claims import CLAIMS_BYTES, Claims, TeeKind
from cocoon.evidence.policy import Policy, TdxImage
from cocoon.evidence.tdx import verify_tdx
from cocoon.evidence.trust import TrustAnchors, anchor
from tests.support.sentences import says_why

KNOWN = json.loads(
    (Path(__file__).resolve().parents[2] / "vectors" / "cai1-identity-binding.json").read_bytes()
)
HASH = st.binary(min_size=32, max_size=32)


def known(name: str) -> bytes:
    return bytes.fromhex(KNOWN[name])


def test_the_known_claims_have_their_known_hashes() -> None:
    claims = Claims.decode(known("claims"))
    assert claims.encode() == known("claims")
    assert claims.x25519_public == known("x25519")
    assert claims.ed25519_public == known("ed25519")
    assert claims.key_epoch == KNOWN["epoch"]
    assert claims.config_hash == known("config")
    assert claims.models_root == known("models_root")
    assert binding.models_root([bytes.fromhex(m) for m in KNOWN["models"]]) == known("models_root")
    assert binding.report_data(known("claims")) == known("report_data")
    assert binding.evidence_id(TeeKind.TDX, known("quote")) == known("evidence_id")
    nonce = binding.gpu_nonce(known("challenge"), known("x25519"), known("ed25519"))
    assert nonce == known("gpu_nonce")


def test_the_known_quote_verifies_and_covers_the_known_claims() -> None:
    quote, root = known("quote"), anchor(TeeKind.TDX, known("dev_root_der"))
    # the signed body of a quote of version 4: rtmr0 begins at 376
    registers = [quote[376 + 48 * i : 424 + 48 * i].hex() for i in range(4)]
    image = TdxImage(
        name="known", mr_td=KNOWN["mr_td"], rtmr0=registers[0], rtmr1=registers[1],
        rtmr2=registers[2], rtmr3=registers[3],
    )  # fmt: skip
    policy = Policy(
        network_id="n", network_class="dev", version=1, anchors=(root.fingerprint,),
        images=(image,),
    )  # fmt: skip
    trust = TrustAnchors("n", "dev", (root,), (bytes(32),), 1, bytes(32))
    collateral = json.dumps(KNOWN["collateral"])
    verdict = verify_tdx(quote, collateral, trust, policy, KNOWN["now"] * 1000)
    assert str(verdict) == "ok:UpToDate"
    assert verdict.evidence_id == known("evidence_id")
    assert verdict.facts is not None
    assert verdict.facts.report_data == KNOWN["report_data"]


@pytest.mark.parametrize(
    "change",
    [
        {"not_before_ms": 0},
        {"not_before_ms": 2**53 - 1, "not_after_ms": 2**53},
        {"key_epoch": 0},
        {"key_epoch": 2**53},
    ],
    ids=["the first time", "the last time", "the first epoch", "the last epoch"],
)
def test_claims_at_the_ends_of_their_ranges_are_written_and_read(change: dict[str, Any]) -> None:
    claims = replace(Claims.decode(known("claims")), **change)
    assert Claims.decode(claims.encode()) == claims


def test_the_hashes_are_over_their_labels_and_their_parts() -> None:
    """A label, then the parts; with their lengths where they could run together."""
    one, two = bytes(32), b"\1" * 32
    reports = b"\0\0\0\2ab" + b"\0\0\0\1c"
    for made, text in (
        (binding.models_root([two, one]), b"cai/1 models\0" + one + two),
        (binding.gpu_nonce(one, two, one), b"cai/1 gpu nonce\0" + one + two + one),
        (binding.gpu_evidence_hash([b"ab", b"c"]), b"cai/1 gpu evidence\0" + reports),
        (binding.challenge(one, "prov_1", two), b"cai/1 challenge\0" + one + b"prov_1" + two),
    ):
        assert made == hashlib.sha256(text).digest()
    assert binding.report_data(b"x") == hashlib.sha512(b"cai/1 report_data\0x").digest()


@pytest.mark.parametrize(("root", "random"), [(31, 32), (32, 31), (33, 32), (32, 33)])
def test_a_challenge_is_made_of_whole_parts_only(root: int, random: int) -> None:
    with pytest.raises(ValueError, match="32 bytes each", check=says_why):
        binding.challenge(bytes(root), "prov_1", bytes(random))


SIGNED_PARTS = [
    (TeeKind.TDX, b"\x04\0", 632),
    (TeeKind.TDX, b"\x05\0" + bytes(48) + (600).to_bytes(4, "little"), 54 + 600),
    (TeeKind.SNP, b"\x02\0\0\0", 0x2A0),
]


@pytest.mark.parametrize(("tee", "head", "size"), SIGNED_PARTS, ids=["TDX 4", "TDX 5", "SNP"])
def test_the_signed_part_ends_where_the_hardware_s_signature_does(
    tee: TeeKind, head: bytes, size: int
) -> None:
    whole = head.ljust(size, b"\7")
    assert binding.signed_part(tee, whole) == whole
    assert binding.signed_part(tee, whole + b"tail") == whole
    label = b"cai/1 evidence\0" + bytes([tee])
    assert binding.evidence_id(tee, whole + b"tail") == hashlib.sha256(label + whole).digest()
    with pytest.raises(ValueError, match="shorter than its signed part", check=says_why):
        binding.signed_part(tee, whole[:-1])


def test_the_order_of_models_does_not_matter_but_their_number_does() -> None:
    one, two = bytes(32), b"\1" * 32
    assert binding.models_root([one, two]) == binding.models_root([two, one])
    assert binding.models_root([one]) != binding.models_root([one, one])


def test_gpu_reports_are_framed() -> None:
    assert binding.gpu_evidence_hash([]) == bytes(32)
    assert binding.gpu_evidence_hash([b"ab", b"c"]) != binding.gpu_evidence_hash([b"a", b"bc"])


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40), HASH, HASH)
def test_a_challenge_belongs_to_one_provider(one: str, two: str, root: bytes, rnd: bytes) -> None:
    try:
        first, second = (binding.challenge(root, name, rnd) for name in (one, two))
    except UnicodeEncodeError:
        return
    assert (first == second) == (one == two)


@st.composite
def some_claims(draw: st.DrawFn) -> Claims:
    begin_ms = draw(st.integers(0, 2**53 - 1))
    return Claims(
        tee=draw(st.sampled_from(TeeKind)),
        x25519_public=draw(HASH),
        ed25519_public=draw(HASH),
        key_epoch=draw(st.integers(0, 2**53)),
        not_before_ms=begin_ms,
        not_after_ms=draw(st.integers(begin_ms + 1, 2**53)),
        models_root=draw(HASH),
        config_hash=draw(HASH),
        gpu_evidence_hash=draw(HASH),
        challenge=draw(HASH),
    )


@given(some_claims())
def test_claims_round_trip(claims: Claims) -> None:
    encoded = claims.encode()
    assert len(encoded) == CLAIMS_BYTES
    assert Claims.decode(encoded) == claims


@pytest.mark.parametrize(
    "change",
    [
        {"x25519_public": bytes(31)},
        {"challenge": bytes(33)},
        {"not_after_ms": 0},
        {"not_before_ms": 5, "not_after_ms": 5},
        {"not_after_ms": 2**53 + 1},
        {"key_epoch": -1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_claims_out_of_range_are_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".", check=says_why):
        replace(Claims.decode(known("claims")), **change).encode()


@pytest.mark.parametrize("at", [0, 4, 6, 7], ids=["magic", "version", "flags", "flags"])
def test_claims_of_another_form_are_not_read(at: int) -> None:
    data = known("claims")
    with pytest.raises(ValueError, match=r"version|flags", check=says_why):
        Claims.decode(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=300), st.binary(min_size=CLAIMS_BYTES, max_size=CLAIMS_BYTES)))
def test_noise_is_no_claims(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".", check=says_why):
        Claims.decode(data)


@given(st.integers(0, CLAIMS_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_changes_the_report_data(at: int, mask: int) -> None:
    data = known("claims")
    changed = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
    assert binding.report_data(changed) != binding.report_data(data)


@given(st.binary(max_size=80))
def test_an_identity_never_comes_from_a_part_of_the_signed_bytes(tail: bytes) -> None:
    for tee in TeeKind:
        with pytest.raises(ValueError, match=r".", check=says_why):
            binding.evidence_id(tee, b"\x04\0" + tail)


def test_an_identity_ignores_what_was_not_signed() -> None:
    quote = known("quote")
    identity = binding.evidence_id(TeeKind.TDX, quote)
    assert binding.evidence_id(TeeKind.TDX, quote[:632] + b"anything") == identity
    assert binding.evidence_id(TeeKind.TDX, quote[:631] + b"\0" + quote[632:]) != identity
