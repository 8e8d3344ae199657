"""Evidence without a TEE: the provider's own signature gets `open`, and nothing gets more of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from cocoon.evidence import claims as binding
from cocoon.evidence.claims import CLAIMS_BYTES, Claims, TeeKind, evidence_id
from cocoon.evidence.collateral import NO_FLOORS
from cocoon.evidence.open_tier import STATEMENT_BYTES, make_statement, verify_statement
from cocoon.evidence.policy import Bans, GpuRules, parse_policy, policy_hash, sign
from cocoon.evidence.provider import ProviderEvidence, parse_evidence, verify_provider
from cocoon.evidence.verdict import Assurance, Verdict
from cocoon.kernel.ids import provider_id
from tests.support.evidence_world import (
    HOUR_MS,
    MODEL,
    NOW_MS,
    SIGNER,
    Scene,
    collateral,
    policy,
    trust,
)
from tests.support.evidence_world import (
    PROVIDER as OTHERS_ID,
)
from tests.support.open_world import (
    CLOSED,
    IDENTITY,
    OPEN_CLAIMS,
    PROVIDER,
    RULES,
    STRANGER,
    OpenScene,
)
from tests.support.sentences import is_sentence

KNOWN = json.loads(
    (Path(__file__).resolve().parents[2] / "vectors" / "open-claims.json").read_bytes()
)
HONEST = OpenScene().provider_evidence()
SIGNED = OpenScene().signed_policy()
TDX = Scene().provider_evidence()


def flip(offset: int) -> Any:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def judged(**changes: Any) -> Verdict:
    evidence = HONEST.model_copy(update=changes)
    return verify_provider(evidence, trust(), SIGNED, NO_FLOORS, NOW_MS)


def test_a_provider_without_a_tee_is_taken_as_open_and_says_so() -> None:
    verdict = OpenScene().verdict()
    assert (str(verdict), verdict.assurance) == ("ok:open", Assurance.OPEN)
    assert verdict.claims == OPEN_CLAIMS
    assert verdict.facts is None
    assert verdict.floors is None
    assert verdict.evidence_id == evidence_id(TeeKind.NONE, HONEST.quote)
    assert "no TEE" in verdict.sentence
    assert "can read" in verdict.next_step


@pytest.mark.parametrize(
    ("scene", "ends_ms"),
    [
        ({}, NOW_MS + HOUR_MS),
        ({"claims": {"not_after_ms": NOW_MS + 100 * HOUR_MS}}, NOW_MS - 60_000 + 2 * HOUR_MS),
        ({"claims": {"not_after_ms": NOW_MS + 1}}, NOW_MS + 1),
    ],
    ids=["its own end", "the policy's greatest age", "the last millisecond"],
)
def test_its_word_is_good_for_a_bounded_time(scene: dict[str, Any], ends_ms: int) -> None:
    assert OpenScene(**scene).verdict().valid_until_ms == ends_ms


REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("a policy from before the open tier", "reject:open_tier", {"policy": {"open_tier": None}}),
    ("a policy that closed it", "reject:open_tier", {"policy": {"open_tier": CLOSED}}),
    ("an unsigned policy", "reject:policy_unsigned", {"signers": (bytes(32),)}),
    ("another's identity key", "reject:identity", {"identity": STRANGER}),
    ("another's provider id", "reject:identity", {"evidence": {"provider_id": OTHERS_ID}}),
    ("a changed magic", "reject:malformed", {"statement": flip(0)}),
    ("another version", "reject:malformed", {"statement": flip(4)}),
    ("a changed identity key", "reject:bad_signature", {"statement": flip(5)}),
    ("changed report data", "reject:bad_signature", {"statement": flip(40)}),
    ("a changed signature", "reject:bad_signature", {"statement": flip(STATEMENT_BYTES - 1)}),
    ("one byte more", "reject:malformed", {"statement": lambda data: data + b"\0"}),
    ("one byte less", "reject:malformed", {"statement": lambda data: data[:-1]}),
    ("no statement", "reject:malformed", {"evidence": {"quote": b""}}),
    ("a quote for a statement", "reject:malformed", {"evidence": {"quote": TDX.quote}}),
    ("collateral beside it", "reject:malformed", {"evidence": {"collateral": collateral()}}),
    ("a GPU report beside it", "reject:malformed", {"evidence": {"gpu_reports": (b"x",)}}),
    ("claims of a TEE", "reject:malformed", {"claims": {"tee": TeeKind.TDX}}),
    ("claims that it did not sign", "reject:report_data_mismatch", {"report_data": bytes(64)}),
    ("another's challenge", "reject:nonce", {"claims": {"challenge": bytes(32)}}),
    ("a model that it did not sign", "reject:models_mismatch",
     {"evidence": {"models": (MODEL, "ab" * 32)}}),
    ("a model that is not listed", "reject:model_denied", {"policy": {"models": ("ab" * 32,)}}),
    ("claims that ended", "reject:claims_window", {"claims": {"not_after_ms": NOW_MS}}),
    ("claims of tomorrow", "reject:claims_window",
     {"claims": {"not_before_ms": NOW_MS + HOUR_MS // 2}}),
    ("claims too old", "reject:too_old", {"claims": {"not_before_ms": NOW_MS - 2 * HOUR_MS}}),
    ("claims of a GPU", "reject:gpu_missing", {"claims": {"gpu_evidence_hash": b"\1" * 32}}),
    ("banned evidence", "reject:banned",
     {"policy": {"bans": Bans(evidence_ids=(evidence_id(TeeKind.NONE, HONEST.quote).hex(),))}}),
    ("no time", "error:clock", {"now_ms": -1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "scene"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_an_attempt_is_refused_with_its_reason(text: str, scene: dict[str, Any]) -> None:
    verdict = OpenScene(**scene).verdict()
    assert str(verdict) == text
    assert (verdict.assurance, verdict.valid_until_ms) == (None, None)
    assert is_sentence(verdict.sentence)


def test_rules_for_hardware_neither_open_nor_close_the_tier() -> None:
    rules = {"gpu": GpuRules(required=True), "images": (), "anchors": ()}
    assert str(OpenScene(policy=rules).verdict()) == "ok:open"
    assert str(Scene(policy={"open_tier": RULES}).verdict()) == "ok:UpToDate"
    assert str(Scene(policy={"open_tier": CLOSED}).verdict()) == "ok:UpToDate"


def test_it_is_open_in_production_too() -> None:
    scene = OpenScene(policy={"network_class": "prod"}, trust={"network_class": "prod"})
    assert str(scene.verdict()) == "ok:open"


# ---- every way to a better label ----


LIFTED: list[tuple[str, dict[str, Any]]] = [
    ("called TDX", {"tee": "tdx"}),
    ("called TDX, with good collateral", {"tee": "tdx", "collateral": collateral()}),
    ("called SNP", {"tee": "snp"}),
    ("another machine's quote over its own claims",
     {"tee": "tdx", "quote": TDX.quote, "collateral": TDX.collateral}),
    ("another machine's quote and claims",
     {"tee": "tdx", "quote": TDX.quote, "collateral": TDX.collateral, "claims": TDX.claims}),
    ("its statement under another machine's claims", {"claims": TDX.claims}),
]  # fmt: skip


@pytest.mark.parametrize("changes", [row[1] for row in LIFTED], ids=[row[0] for row in LIFTED])
def test_no_mixture_with_real_evidence_lifts_it(changes: dict[str, Any]) -> None:
    assert not judged(**changes).ok


def test_a_statement_over_claims_of_a_tee_is_no_quote() -> None:
    evidence = OpenScene(claims={"tee": TeeKind.TDX}).provider_evidence()
    for changes in ({"tee": "tdx"}, {"tee": "tdx", "collateral": collateral()}, {}):
        found = evidence.model_copy(update=changes)
        assert not verify_provider(found, trust(), SIGNED, NO_FLOORS, NOW_MS).ok


def _changed(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


_CLAIMS = st.builds(
    lambda at, mask: _changed(HONEST.claims, at, mask),
    st.integers(0, CLAIMS_BYTES - 1), st.integers(0, 255),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    tee=st.sampled_from(["tdx", "snp", "none"]),
    kind=st.sampled_from(TeeKind),
    identity=st.sampled_from([IDENTITY, STRANGER]),
    named=st.sampled_from([PROVIDER, OTHERS_ID]),
    quote=st.one_of(st.just(b""), st.binary(max_size=200), st.just(TDX.quote)),
    own=st.booleans(),
    claims=st.one_of(st.none(), _CLAIMS, st.just(TDX.claims)),
    facility=st.booleans(),
    gpu=st.booleans(),
)
def test_nothing_that_a_provider_signs_itself_is_ever_more_than_open(
    tee: Any, kind: TeeKind, identity: SigningKey, named: str, quote: bytes, own: bool,
    claims: bytes | None, facility: bool, gpu: bool,
) -> None:  # fmt: skip
    """Bytes of its own making, mixed with another's quote: what is ok is open, and the honest one.
    (All of the other's together is the other's evidence.)
    """
    scene = OpenScene(claims={"tee": kind}, identity=identity)
    made = scene.provider_evidence()
    found = made.model_copy(
        update={
            "tee": tee,
            "provider_id": named,
            "quote": made.quote if own else quote,
            "claims": made.claims if claims is None else claims,
            "collateral": TDX.collateral if facility else None,
            "gpu_reports": (b"report",) if gpu else (),
        }
    )
    verdict = verify_provider(found, trust(), SIGNED, NO_FLOORS, NOW_MS)
    if verdict.ok and found != TDX:
        assert (verdict.assurance, str(verdict)) == (Assurance.OPEN, "ok:open")
        assert found == HONEST


@settings(max_examples=200, deadline=None)
@given(st.integers(0, STATEMENT_BYTES - 1), st.integers(1, 255))
def test_no_changed_byte_of_a_statement_is_taken(at: int, mask: int) -> None:
    assert not judged(quote=_changed(HONEST.quote, at, mask)).ok


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=STATEMENT_BYTES + 10))
def test_noise_is_no_statement(data: bytes) -> None:
    for statement in (data, HONEST.quote[:101] + data, b"CAIO\1" + data):
        verdict, _ = verify_statement(statement, PROVIDER, policy(open_tier=RULES), NOW_MS)
        assert not verdict.ok


@given(st.text(min_size=1))
def test_no_text_that_a_server_of_the_bus_asks_for_becomes_a_statement(nonce: str) -> None:
    """It signs the server's nonce with the same key: the bytes must never be the same."""
    signed_as = b"cai/1 open statement\0\xff"
    try:
        assert not nonce.encode().startswith(signed_as)
    except UnicodeEncodeError:
        return
    with pytest.raises(UnicodeDecodeError):
        (signed_as + HONEST.quote[:101]).decode()


def test_report_data_has_64_bytes() -> None:
    for size in (0, 63, 65):
        with pytest.raises(ValueError, match="64 bytes"):
            make_statement(IDENTITY, bytes(size))


# ---- the policy's document ----


def test_a_policy_without_an_open_tier_keeps_the_bytes_and_the_hash_that_it_had() -> None:
    known = bytes.fromhex(KNOWN["policy_without"]["signed"])
    read = parse_policy(known)
    assert read.to_canonical() == known
    assert policy_hash(read.policy).hex() == KNOWN["policy_without"]["hash"]
    assert b"open_tier" not in known
    assert read.policy.open_rules is None


def test_the_open_tier_is_under_the_policy_s_signature_and_hash() -> None:
    without, opened, closed = (policy(open_tier=rules) for rules in (None, RULES, CLOSED))
    assert len({policy_hash(item) for item in (without, opened, closed)}) == 3
    assert parse_policy(sign(opened, [SIGNER]).to_canonical()).policy == opened
    assert opened.open_rules == RULES
    assert closed.open_rules is None


@pytest.mark.parametrize(
    "change",
    [
        {"allowed": None}, {"max_running_jobs": 0}, {"max_providers": 0}, {"max_job_nanoton": "-1"},
        {"max_providers": 10_001}, {"more": 1},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_an_open_tier_of_another_form_is_not_read(change: dict[str, Any]) -> None:
    document = json.loads(sign(policy(open_tier=RULES), [SIGNER]).to_canonical())
    document["policy"]["open_tier"].update(change)
    with pytest.raises(ValueError, match=r"expected form at 'policy\.open_tier"):
        parse_policy(json.dumps(document).encode())


# ---- known answers ----


def known(name: str) -> bytes:
    return bytes.fromhex(KNOWN[name])


def test_the_known_statement_is_made_and_read_as_it_was() -> None:
    identity = SigningKey(known("identity_seed"))
    assert bytes(identity.verify_key) == known("identity_key")
    assert provider_id(known("identity_key")) == KNOWN["provider_id"]
    claims = Claims.decode(known("claims"))
    assert (claims.encode(), claims.tee) == (known("claims"), TeeKind.NONE)
    assert binding.report_data(known("claims")) == known("report_data")
    assert make_statement(identity, known("report_data")) == known("statement")
    assert evidence_id(TeeKind.NONE, known("statement")) == known("evidence_id")


def test_the_known_evidence_gets_its_known_verdict() -> None:
    evidence = parse_evidence(json.dumps(KNOWN["evidence"]).encode())
    assert evidence == ProviderEvidence(**KNOWN["evidence"])
    signed = parse_policy(known("policy_with"))
    found = verify_provider(evidence, trust(), signed, NO_FLOORS, KNOWN["now_ms"])
    assert str(found) == KNOWN["verdict"]
    assert found.assurance == KNOWN["assurance"]
    assert found.valid_until_ms == KNOWN["valid_until_ms"]
    assert found.evidence_id == known("evidence_id")
