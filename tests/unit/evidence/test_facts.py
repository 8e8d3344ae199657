"""What a verdict tells beside its decision: facts, identity, floors, assurance, and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from cocoon.devnet.authority import OUT_OF_DATE, SW_HARDENING, CollateralKnobs
from cocoon.devnet.dev_platform import DEV_IMAGE, Knobs
from cocoon.evidence import qvl
from cocoon.evidence.claims import TeeKind, evidence_id, report_data
from cocoon.evidence.collateral import (
    CollateralFloor,
    CollateralFloors,
    chain_der,
    parse_collateral,
)
from cocoon.evidence.policy import Bans, TdxRules
from cocoon.evidence.provider import (
    MAX_CLOCK_SKEW_MS,
    MAX_EVIDENCE_BYTES,
    collateral_hash,
    parse_evidence,
)
from cocoon.evidence.tdx import MAX_QUOTE_BYTES, verify_tdx
from cocoon.evidence.trust import INTEL_SGX_ROOT_SHA256
from cocoon.evidence.verdict import Assurance, Verdict, accept
from cocoon.kernel.errors import EvidenceRejected
from tests.support.evidence_world import (
    CLAIMS,
    DAY_MS,
    FMSPC,
    HOUR_MS,
    MODEL,
    NOW_MS,
    PPID,
    Scene,
    authority,
    platform,
    policy,
    trust,
)
from tests.support.sentences import is_sentence, says_why

HARDENING = TdxRules(allowed_statuses=("SWHardeningNeeded",))
LAST_SECOND = TdxRules(allowed_statuses=("OutOfDate",), platform_grace_s=61 * 86_400 + 3600)
SEEN = CollateralFloor(evaluation_number=100, root_crl_number=1, pck_crl_number=1)
PEM = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"


def identity_of(scene: Scene) -> bytes:
    return evidence_id(TeeKind.TDX, scene.provider_evidence().quote)


@pytest.mark.parametrize("version", [4, 5])
def test_facts_are_what_the_quote_and_the_collateral_say(version: int) -> None:
    scene = Scene(level=SW_HARDENING, knobs=Knobs(version=version), policy={"tdx": HARDENING})
    facts = scene.verdict().facts
    assert facts is not None
    assert facts.quote_version == version
    assert (facts.mr_td, facts.image) == (DEV_IMAGE.mr_td, DEV_IMAGE.name)
    assert facts.rtmrs == (DEV_IMAGE.rtmr0, DEV_IMAGE.rtmr1, DEV_IMAGE.rtmr2, DEV_IMAGE.rtmr3)
    assert facts.mr_config_id == DEV_IMAGE.mr_config_id
    assert (facts.mr_owner, facts.mr_owner_config) == (
        DEV_IMAGE.mr_owner, DEV_IMAGE.mr_owner_config,
    )  # fmt: skip
    assert (facts.td_attributes, facts.xfam) == ("0000001000000000", "e702060000000000")
    assert facts.report_data == report_data(CLAIMS.encode()).hex()
    assert (facts.ppid, facts.fmspc) == (PPID.hex(), FMSPC)
    assert (facts.tcb_status, facts.advisories) == ("SWHardeningNeeded", ("DEV-SA-00002",))
    assert facts.tcb_date_ms == NOW_MS - HOUR_MS - 31 * DAY_MS
    assert facts.evaluation_number == 100
    assert facts.root_fingerprint == authority().anchor.fingerprint
    assert len(facts.mr_seam) == 96


def test_each_register_is_told_in_its_own_place() -> None:
    names = ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "mr_owner",
             "mr_owner_config")  # fmt: skip
    marked = {name: f"{number:02x}" * 48 for number, name in enumerate(names, start=1)}
    image = DEV_IMAGE.model_copy(update={**marked, "name": "marked"})
    facts = Scene(image=image, policy={"images": (DEV_IMAGE, image)}).verdict().facts
    assert facts is not None
    told = (facts.mr_td, *facts.rtmrs, facts.mr_config_id, facts.mr_owner, facts.mr_owner_config)
    assert told == tuple(marked.values())
    assert facts.image == "marked"


def test_an_accepted_verdict_carries_identity_claims_and_floors() -> None:
    scene = Scene()
    verdict = scene.verdict()
    assert verdict.evidence_id == identity_of(scene)
    assert verdict.claims == CLAIMS
    assert verdict.floors == CollateralFloors(by_fmspc={FMSPC: SEEN})
    assert is_sentence(verdict.sentence)


REFUSED_LATE: list[tuple[str, dict[str, Any], bool]] = [
    ("reject:banned", {"policy": {"bans": Bans(ppids=(PPID.hex(),))}}, False),
    ("reject:measurement", {"policy": {"images": ()}}, False),
    ("reject:report_data_mismatch", {"report_data": bytes(64)}, False),
    ("reject:collateral_expired", {"level": OUT_OF_DATE, "policy": {"tdx": LAST_SECOND}}, False),
    ("reject:nonce", {"evidence": {"checkpoint_root": "cd" * 32}}, True),
    ("reject:too_old", {"claims": {"not_before_ms": NOW_MS - 2 * HOUR_MS}}, True),
]


@pytest.mark.parametrize(("expected", "scene", "covered"), REFUSED_LATE, ids=str)
def test_a_refusal_of_an_authentic_quote_carries_what_was_proved(
    expected: str, scene: dict[str, Any], covered: bool
) -> None:
    """Whoever bans a machine or keeps floors needs them from a refusal, too."""
    attempt = Scene(**scene)
    verdict = attempt.verdict()
    assert str(verdict) == expected
    assert verdict.evidence_id == identity_of(attempt)
    assert verdict.facts is not None
    assert verdict.facts.ppid == PPID.hex()
    assert verdict.floors is not None
    assert verdict.floors.of(FMSPC) == SEEN
    assert (verdict.claims is not None) == covered  # keys are told only where the quote has them


@pytest.mark.parametrize(
    ("floor", "code"),
    [
        ({"evaluation_number": 101}, "tcb_eval_number"),
        ({"root_crl_number": 2}, "crl_stale"),
        ({"pck_crl_number": 2}, "crl_stale"),
    ],
)
def test_rolled_back_collateral_tells_the_machine_and_lowers_no_floor(
    floor: dict[str, int], code: str
) -> None:
    floors = CollateralFloors(by_fmspc={FMSPC: CollateralFloor(**floor)})
    verdict = Scene(floors=floors).verdict()
    assert str(verdict) == f"reject:{code}"
    assert verdict.facts is not None
    assert verdict.floors is None


@pytest.mark.parametrize(
    ("scene", "code"),
    [
        ({"evidence": {"collateral": None}}, "error:collateral_missing"),
        ({"collateral": "{"}, "reject:collateral_malformed"),
        ({"policy": {"anchors": ("cd" * 32,)}}, "reject:unknown_root"),
    ],
)
def test_a_quote_is_named_before_anything_is_proved_of_it(scene: dict[str, Any], code: str) -> None:
    attempt = Scene(**scene)
    verdict = attempt.verdict()
    assert str(verdict) == code
    assert verdict.evidence_id == identity_of(attempt)
    assert (verdict.facts, verdict.claims, verdict.floors) == (None, None, None)


DETAILS: list[tuple[dict[str, Any], str]] = [
    ({"quote": lambda q: q + bytes(16 * 1024)}, "A quote has at most 16 KiB."),
    ({"quote": lambda q: b"\x03\x00" + q[2:]}, "In detail: a TDX quote has version 4 or 5."),
    ({"collateral": "{"}, "In detail: the collateral lacks a part or holds an unknown one."),
    ({"evidence": {"claims": bytes(223)}}, "In detail: claims are 224 bytes."),
    ({"claims": {"tee": 2}}, "The claims name another kind of machine than the evidence."),
    ({"policy": {"network_id": "other"}}, "It is the policy of another network."),
    ({"trust": {"network_class": "prod"}}, "The policy is of class dev."),
    ({"evidence": {"tee": "snp"}}, "AMD SEV-SNP is not verified yet."),
    ({"evidence": {"gpu_reports": (b"r",)}}, "NVIDIA GPU reports are not verified yet."),
    ({"claims": {"not_before_ms": NOW_MS + HOUR_MS - 1}}, "They begin in the future."),
    ({"claims": {"not_after_ms": NOW_MS}}, "They have ended."),
    ({"evidence": {"models": (MODEL, MODEL)}}, "A model is listed twice."),
    ({"collateral": CollateralKnobs(signer=platform())}, "not the vendor's TCB signer."),
    ({"collateral": CollateralKnobs(qe_status="ConfigurationNeeded")}, "enclave's status."),
    (
        {"floors": CollateralFloors(by_fmspc={FMSPC: CollateralFloor(evaluation_number=101)})},
        "A greater number was seen before.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scene", "detail"), DETAILS, ids=[row[1] for row in DETAILS])
def test_a_refusal_says_which_of_its_causes_it_was(scene: dict[str, Any], detail: str) -> None:
    verdict = Scene(**scene).verdict()
    assert verdict.sentence.endswith(detail)
    assert is_sentence(verdict.sentence)


# ---- what no dev network can show: a machine under the vendor's own root ----


def genuine(**changes: Any) -> Verdict:
    """The dev root under the name of the vendor's: a stand-in for real hardware."""
    root = replace(authority().anchor, fingerprint=INTEL_SGX_ROOT_SHA256)
    return Scene(
        trust={"network_class": "prod", "anchors": (root,)},
        policy={"network_class": "prod", "anchors": (INTEL_SGX_ROOT_SHA256,), **changes},
    ).verdict()


def test_genuine_hardware_is_attested_and_in_a_listed_place_a_facility() -> None:
    assert genuine().assurance is Assurance.ATTESTED
    assert genuine(facility_ppids=("00" * 16,)).assurance is Assurance.ATTESTED
    assert genuine(facility_ppids=(PPID.hex(),)).assurance is Assurance.FACILITY


# ---- bounds ----


@pytest.mark.parametrize(
    ("begins_in_ms", "code"),
    [(MAX_CLOCK_SKEW_MS, "ok:UpToDate"), (MAX_CLOCK_SKEW_MS + 1, "reject:claims_window")],
)
def test_an_enclave_s_clock_may_be_two_minutes_ahead(begins_in_ms: int, code: str) -> None:
    assert str(Scene(claims={"not_before_ms": NOW_MS + begins_in_ms}).verdict()) == code


@pytest.mark.parametrize(
    ("age_ms", "code"), [(2 * HOUR_MS - 1, "ok:UpToDate"), (2 * HOUR_MS, "reject:too_old")]
)
def test_evidence_may_be_as_old_as_the_policy_says(age_ms: int, code: str) -> None:
    assert str(Scene(claims={"not_before_ms": NOW_MS - age_ms}).verdict()) == code


def test_claims_hold_to_their_last_millisecond() -> None:
    assert Scene(claims={"not_after_ms": NOW_MS + 1}).verdict().valid_until_ms == NOW_MS + 1


@pytest.mark.parametrize(
    ("at_ms", "code"),
    [(NOW_MS, "ok:UpToDate"), (NOW_MS + 1000, "reject:collateral_not_yet_valid")],
)
def test_collateral_is_good_from_the_moment_of_its_date(at_ms: int, code: str) -> None:
    assert str(Scene(collateral_at_ms=at_ms).verdict()) == code


def test_a_quote_may_fill_its_bound() -> None:
    scene = Scene(quote=lambda quote: quote.ljust(MAX_QUOTE_BYTES, b"\0"))
    assert str(scene.verdict()) == "ok:UpToDate"


@pytest.mark.parametrize("now_ms", [0, 2**53])
def test_any_time_is_a_time(now_ms: int) -> None:
    verdict = Scene(now_ms=now_ms).verdict()
    assert not verdict.ok
    assert verdict.code != "clock"


@pytest.mark.parametrize("size", [*range(8), 47, 48])
def test_a_quote_cut_in_its_header_is_malformed(size: int) -> None:
    quote = platform().quote(bytes(64))[:size]
    verdict = verify_tdx(quote, "{}", trust(), policy(), NOW_MS)
    assert str(verdict) == "reject:malformed"


def test_a_quote_of_no_known_tee_is_malformed() -> None:
    verdict = Scene(quote=lambda quote: quote[:4] + b"\x82" + quote[5:]).verdict()
    assert str(verdict) == "reject:malformed"
    assert verdict.evidence_id is None  # no parser saw it


@pytest.mark.parametrize(("size", "code"), [(7, "malformed"), (8, "not_tdx"), (9, "not_tdx")])
def test_an_sgx_quote_is_known_by_its_first_eight_bytes(size: int, code: str) -> None:
    verdict = verify_tdx(bytes((3, 0, 2, *bytes(13)))[:size], "{}", trust(), policy(), NOW_MS)
    assert str(verdict) == f"reject:{code}"


@pytest.mark.parametrize("models", [(MODEL,), (MODEL, "cd" * 32), None])
def test_a_policy_s_models_may_be_those_that_are_offered_more_or_any(models: Any) -> None:
    assert str(Scene(policy={"models": models}).verdict()) == "ok:UpToDate"


# ---- the library's appraisal ----


@pytest.mark.parametrize(("version", "current"), [(4, None), (5, "UpToDate")])
def test_an_appraisal_holds_what_the_library_found(version: int, current: str | None) -> None:
    scene = Scene(
        knobs=Knobs(version=version),
        collateral=CollateralKnobs(evaluation_number=7, root_crl_number=8, pck_crl_number=9),
    )
    parts = parse_collateral(scene.collateral_text())
    quote = scene.provider_evidence().quote
    found = qvl.appraise(quote, parts, authority().anchor.der, TdxRules(), NOW_MS // 1000)
    assert isinstance(found, qvl.Appraisal)
    assert (found.quote_version, found.tee_type, found.current_status) == (version, 0x81, current)
    assert (found.tcb_status, found.platform_status, found.qe_status) == ("UpToDate",) * 3
    numbers = (found.evaluation_number, found.root_crl_number, found.pck_crl_number)
    assert numbers == (7, 8, 9)
    assert found.tcb_date_s * 1000 == NOW_MS - HOUR_MS - DAY_MS
    assert datetime.fromisoformat(found.qe_date).timestamp() * 1000 < NOW_MS
    assert (found.ppid, found.fmspc, found.advisories) == (PPID.hex(), FMSPC, ())
    assert found.latest_issue_s * 1000 == NOW_MS - HOUR_MS
    assert found.earliest_expiration_s * 1000 == NOW_MS - HOUR_MS + 30 * DAY_MS


def test_a_time_that_the_library_does_not_take_is_a_refusal() -> None:
    parts = parse_collateral(Scene().collateral_text())
    found = qvl.appraise(b"", parts, authority().anchor.der, TdxRules(), 2**80)
    assert found == "refused"


# ---- parts ----


def test_evidence_is_read_in_any_spacing_up_to_its_bound_and_in_one_spelling() -> None:
    evidence = Scene().provider_evidence()
    fields = json.loads(evidence.to_canonical())
    spaced = json.dumps(fields, indent=2).encode()
    assert parse_evidence(spaced) == evidence
    assert parse_evidence(spaced.ljust(MAX_EVIDENCE_BYTES)) == evidence
    spoilt = {**fields, "quote": f"{fields['quote'][:8]}!{fields['quote'][8:]}"}
    for refused in (spaced.ljust(MAX_EVIDENCE_BYTES + 1), json.dumps(spoilt).encode()):
        with pytest.raises(EvidenceRejected, check=says_why):
            parse_evidence(refused)


def test_collateral_is_named_by_its_bytes() -> None:
    evidence = Scene().provider_evidence()
    assert evidence.collateral is not None
    assert collateral_hash(evidence) == hashlib.sha256(evidence.collateral.encode()).digest()
    without = evidence.model_copy(update={"collateral": None})
    assert collateral_hash(without) == hashlib.sha256(b"").digest()


def test_a_chain_is_its_certificates_in_order() -> None:
    chain = platform().chain
    ders = chain_der(chain)
    assert len(ders) == 3
    assert ders[-1] == authority().anchor.der
    assert chain_der(chain.replace("\n", "\r\n")) == ders
    assert chain_der("") == []


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        ("x", "something other than certificates"),
        (PEM.format("MII!"), "something other than certificates"),
        (PEM.format("AA==AAAA"), "is not base64"),
        (PEM.format("AAA"), "is not base64"),
    ],
)
def test_a_chain_of_another_form_is_refused(chain: str, says: str) -> None:
    with pytest.raises(ValueError, match=says, check=says_why):
        chain_der(chain)


def test_collateral_may_fill_its_bound() -> None:
    text = Scene().collateral_text()
    full = text.ljust(256 * 1024)
    assert parse_collateral(full) == parse_collateral(text)
    with pytest.raises(ValueError, match="larger than 256 KiB", check=says_why):
        parse_collateral(full + " ")
    with pytest.raises(ValueError, match="lacks a part", check=says_why):
        parse_collateral("{}")


def test_an_accepted_verdict_is_read_as_one() -> None:
    verdict = accept("UpToDate", Assurance.ATTESTED, 7)
    assert (str(verdict), verdict.ok, verdict.valid_until_ms) == ("ok:UpToDate", True, 7)
    assert verdict.next_step == "Nothing."
    assert str(replace(verdict, code="")) == "ok"


class PanicException(BaseException):
    """What a panic inside the quote library arrives as; its own class cannot be imported."""


@pytest.mark.parametrize("where", ["QuoteVerifier", "verify_with_root_ca"])
def test_a_panic_inside_the_library_is_a_refusal_and_an_interrupt_is_not(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(error: BaseException) -> Any:
        def raising(*_: object) -> None:
            raise error

        return raising

    changed = {} if where == "QuoteVerifier" else {"level": OUT_OF_DATE}
    expected = "reject:refused" if where == "QuoteVerifier" else "reject:tcb_status"
    monkeypatch.setattr(qvl.dcap_qvl, where, stop(PanicException()))
    assert str(Scene(**changed).verdict()) == expected
    monkeypatch.setattr(qvl.dcap_qvl, where, stop(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Scene(**changed).verdict()
