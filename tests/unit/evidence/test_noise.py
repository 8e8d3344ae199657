"""Malformed inputs get a verdict, never an exception, and a changed byte is never taken."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cocoon.evidence.collateral import NO_FLOORS
from cocoon.evidence.policy import parse_policy
from cocoon.evidence.provider import ProviderEvidence, parse_evidence, verify_provider
from cocoon.evidence.tdx import verify_tdx
from cocoon.evidence.verdict import Verdict
from cocoon.kernel.errors import EvidenceRejected
from tests.support.evidence_world import NOW_MS, Scene, collateral, policy, trust
from tests.support.sentences import says_why

SCENE = Scene()
EVIDENCE = SCENE.provider_evidence()
SIGNED = SCENE.signed_policy()
QUOTE = EVIDENCE.quote
PARTS = json.loads(collateral())
AUTH_DATA_END = 632 + 4 + int.from_bytes(QUOTE[632:636], "little")


def judge(quote: bytes, text: str | None) -> Verdict:
    return verify_tdx(quote, text, trust(), policy(), NOW_MS)


def whole(**changes: object) -> Verdict:
    evidence = EVIDENCE.model_copy(update=changes)
    return verify_provider(evidence, trust(), SIGNED, NO_FLOORS, NOW_MS)


def test_the_unchanged_evidence_is_taken() -> None:
    assert whole().ok
    assert len(QUOTE) == AUTH_DATA_END


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 631), st.integers(1, 255))
def test_no_changed_byte_of_the_signed_part_is_taken(at: int, mask: int) -> None:
    changed = QUOTE[:at] + bytes([QUOTE[at] ^ mask]) + QUOTE[at + 1 :]
    assert not whole(quote=changed).ok


@settings(max_examples=250, deadline=None)
@given(st.integers(632, len(QUOTE) - 1), st.integers(1, 255))
def test_a_changed_byte_behind_it_cannot_change_the_identity_or_the_keys(
    at: int, mask: int
) -> None:
    changed = QUOTE[:at] + bytes([QUOTE[at] ^ mask]) + QUOTE[at + 1 :]
    verdict = whole(quote=changed)
    if verdict.ok:  # bytes that no signature covers, such as a line break in PEM
        assert verdict.evidence_id == whole().evidence_id
        assert verdict.claims == whole().claims


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 223), st.integers(1, 255))
def test_no_changed_claim_is_taken(at: int, mask: int) -> None:
    data = EVIDENCE.claims
    assert not whole(claims=data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]).ok


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2000))
@example(b"")
@example(b"\x05\0\x02\0\x81\0\0\0" + b"\xff" * 100)
@example(QUOTE[:48] + b"\xff" * 16_000)
@example(b"\xff" * 17_000)
def test_noise_for_a_quote_is_refused(quote: bytes) -> None:
    assert not judge(quote, collateral()).ok
    assert not judge(QUOTE[:48] + quote, collateral()).ok
    assert not judge(QUOTE[:632] + quote, collateral()).ok
    assert not judge(QUOTE[:2700] + quote, collateral()).ok


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.none(), st.text(max_size=400), st.binary(max_size=400).map(repr)))
@example("[" * 100_000)
@example("{" + '"a":' * 50_000)
@example("x" * 300_000)
@example("\ud800")
def test_noise_for_collateral_is_refused(text: str | None) -> None:
    assert not judge(QUOTE, text).ok


def test_good_collateral_in_too_much_padding_is_not_parsed() -> None:
    assert judge(QUOTE, collateral() + " " * 1000).ok
    assert str(judge(QUOTE, collateral() + " " * 300_000)) == "reject:collateral_malformed"


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(PARTS)), st.data())
def test_a_changed_character_of_collateral_never_changes_what_is_accepted(
    part: str, data: st.DataObject
) -> None:
    text = PARTS[part]
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(min_codepoint=1, max_codepoint=0x2FF))
    verdict = judge(QUOTE, json.dumps({**PARTS, part: text[:at] + letter + text[at + 1 :]}))
    if verdict.ok:  # the other case of a hex digit, PEM's spaces, or a chain that is not used
        assert verdict.facts == judge(QUOTE, collateral()).facts


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(PARTS)), st.binary(max_size=300))
def test_noise_for_a_part_of_collateral_is_refused(part: str, noise: bytes) -> None:
    if part == "pck_crl_issuer_chain":
        return  # travels along, but only the chain inside the quote is used
    assert not judge(QUOTE, json.dumps({**PARTS, part: noise.hex() or "00"})).ok


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode)))
@example(b"[" * 100_000)
@example(b'{"a":1,"a":2}')
def test_noise_on_the_wire_is_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(EvidenceRejected, check=says_why) as refusal:
        parse_evidence(data)
    assert refusal.value.code == "malformed"
    with pytest.raises(ValueError, match=r".", check=says_why):
        parse_policy(data)


def test_evidence_survives_the_wire() -> None:
    sent = EVIDENCE.model_copy(update={"bundles": (b"one", b"two")})
    assert parse_evidence(sent.to_canonical()) == sent


def test_evidence_with_an_unknown_field_is_refused() -> None:
    fields = json.loads(EVIDENCE.to_canonical())
    assert ProviderEvidence.model_validate(fields) == EVIDENCE
    with pytest.raises(EvidenceRejected, check=says_why):
        parse_evidence(json.dumps({**fields, "extra": 1}).encode())
    with pytest.raises(EvidenceRejected, check=says_why):
        parse_evidence(json.dumps({**fields, "quote": "not base64!"}).encode())
