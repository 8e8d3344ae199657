# ruff: noqa: E501 - a scenario is a line
# fmt: off
"""Every verdict that a provider can get: one scenario a line, through the one public door."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocoon.devnet.authority import OUT_OF_DATE, SW_HARDENING, UNLISTED, CollateralKnobs
from cocoon.devnet.dev_certificates import PlatformLevel, revocation_list
from cocoon.devnet.dev_platform import DEV_IMAGE, Knobs
from cocoon.evidence import codes, qvl
from cocoon.evidence.claims import TeeKind, evidence_id, models_root
from cocoon.evidence.collateral import CollateralFloor, CollateralFloors
from cocoon.evidence.policy import Bans, GpuRules, TdxRules
from cocoon.evidence.provider import verify_provider
from cocoon.evidence.qvl import code_of
from cocoon.evidence.trust import INTEL_SGX_ROOT_SHA256, intel_anchor
from cocoon.evidence.verdict import Assurance, fail, reject
from tests.support.evidence_world import (
    DAY_MS,
    FMSPC,
    HOUR_MS,
    MODEL,
    NOW_MS,
    PPID,
    SIGNER,
    Scene,
    authority,
    platform,
    trust,
)
from tests.support.sentences import is_sentence, says_why

Bytes = Callable[[bytes], bytes]
OTHER_48 = "ab" * 48
OTHER_32 = "cd" * 32
DYNAMIC = PlatformLevel(dynamic=True)
CACHED = PlatformLevel(cached_keys=True)
SMT = PlatformLevel(smt=True)
GRACE = TdxRules(allowed_statuses=("OutOfDate",), platform_grace_s=90 * 86_400)
SHORT_GRACE = TdxRules(allowed_statuses=("OutOfDate",), platform_grace_s=30 * 86_400)
LAST_SECOND = TdxRules(allowed_statuses=("OutOfDate",), platform_grace_s=61 * 86_400 + 3600)
NO_GRACE = TdxRules(allowed_statuses=("OutOfDate",))
QE_GRACE = TdxRules(allowed_statuses=("OutOfDate",), qe_grace_s=30 * 86_400)
QE_ALONE = TdxRules(
    allowed_statuses=("OutOfDateConfigurationNeeded",), qe_grace_s=30 * 86_400,
    platform_grace_s=90 * 86_400,
)
HARDENING = TdxRules(allowed_statuses=("SWHardeningNeeded",))
REFUSES_SA_2 = TdxRules(
    allowed_statuses=("SWHardeningNeeded",), refused_advisories=("DEV-SA-00002",)
)
NO_DEBUG_RULE = TdxRules(td_attributes=("0100001000000000", "0000001000000000"))


def flip(offset: int) -> Bytes:
    def change(quote: bytes) -> bytes:
        return quote[:offset] + bytes([quote[offset] ^ 1]) + quote[offset + 1 :]

    return change


def edit(part: str, old: str, new: str) -> Callable[[dict[str, str]], dict[str, str]]:
    def change(collateral: dict[str, str]) -> dict[str, str]:
        assert old in collateral[part]
        return {**collateral, part: collateral[part].replace(old, new, 1)}

    return change


def put(part: str, value: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda collateral: {**collateral, part: value}


def drop(part: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda collateral: {key: collateral[key] for key in collateral if key != part}


def partly_by_a_platform(part: str) -> Callable[[dict[str, str]], dict[str, str]]:
    """Good collateral, but one of its two signed parts is a platform's work."""
    text = authority().collateral(NOW_MS - HOUR_MS, knobs=CollateralKnobs(signer=platform()))
    theirs = {key: value for key, value in json.loads(text).items() if key.startswith(part)}
    assert len(theirs) == 3
    return lambda collateral: {**collateral, **theirs}


def floor(**numbers: int) -> CollateralFloors:
    return CollateralFloors(by_fmspc={FMSPC: CollateralFloor(**numbers)})


def knobs(**fields: Any) -> dict[str, Any]:
    return {"knobs": Knobs(**fields)}


def image(**fields: Any) -> dict[str, Any]:
    return {"image": DEV_IMAGE.model_copy(update=fields)}


def collateral(**fields: Any) -> dict[str, Any]:
    return {"collateral": CollateralKnobs(**fields)}


def certificate() -> Any:
    return platform().certificate


def future_list() -> str:
    window_ms = (NOW_MS + HOUR_MS, NOW_MS + DAY_MS)
    return revocation_list(authority().pck_ca, authority().pck_ca_key, window_ms, 1).hex()


ACCEPTED: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
    ("a quote of version 4", "ok:UpToDate", dict),
    ("a quote of version 5", "ok:UpToDate", lambda: knobs(version=5)),
    ("bytes after the quote change nothing", "ok:UpToDate", lambda: {"quote": lambda q: q + b"x"}),
    ("a status that the policy takes", "ok:SWHardeningNeeded", lambda: {"level": SW_HARDENING, "policy": {"tdx": HARDENING}}),
    ("out of date within the grace", "ok:OutOfDate", lambda: {"level": OUT_OF_DATE, "policy": {"tdx": GRACE}}),
    ("an out of date enclave within its grace", "ok:OutOfDate", lambda: {**collateral(qe_status="OutOfDate"), "policy": {"tdx": QE_GRACE}}),
    ("an out of date enclave on a platform that needs configuration", "ok:OutOfDateConfigurationNeeded", lambda: {**collateral(qe_status="OutOfDate", statuses=("ConfigurationNeeded",) * 3), "policy": {"tdx": QE_ALONE}}),
    ("SMT where the policy takes it", "ok:UpToDate", lambda: {"level": SMT, "policy": {"tdx": TdxRules(allow_smt=True)}}),
    ("an enclave's clock a minute ahead", "ok:UpToDate", lambda: {"claims": {"not_before_ms": NOW_MS + 60_000}}),
    ("collateral at the floors", "ok:UpToDate", lambda: {"floors": floor(evaluation_number=100, root_crl_number=1, pck_crl_number=1)}),
    ("a model on the list", "ok:UpToDate", lambda: {"policy": {"models": (MODEL, OTHER_32)}}),
    ("Intel's root before the dev one that the policy names", "ok:UpToDate", lambda: {"trust": {"anchors": (intel_anchor(), authority().anchor)}}),
    ("Intel's root beside the dev one", "ok:UpToDate", lambda: {"trust": {"anchors": (intel_anchor(), authority().anchor)}, "policy": {"anchors": (INTEL_SGX_ROOT_SHA256, authority().anchor.fingerprint)}}),
]

REFUSED: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
    # the quote's form
    ("an empty quote", "reject:malformed", lambda: {"quote": lambda q: b""}),
    ("a cut quote", "reject:malformed", lambda: {"quote": lambda q: q[:4000]}),
    ("a quote over 16 KiB", "reject:malformed", lambda: {"quote": lambda q: q + bytes(16 * 1024)}),
    ("another attestation key type", "reject:malformed", lambda: knobs(attestation_key_type=3)),
    ("another quoting vendor", "reject:malformed", lambda: knobs(vendor=bytes(16))),
    ("a chain that is no PEM", "reject:malformed", lambda: knobs(chain="-")),
    ("an SGX quote", "reject:not_tdx", lambda: {"quote": lambda q: q[:4] + bytes(4) + q[8:]}),
    ("claims that are cut", "reject:malformed", lambda: {"evidence": {"claims": bytes(223)}}),
    ("claims of another kind of machine", "reject:malformed", lambda: {"claims": {"tee": 2}}),
    # signatures
    ("a changed header", "reject:bad_signature", lambda: {"quote": flip(8)}),
    ("a changed register", "reject:bad_signature", lambda: {"quote": flip(400)}),
    ("changed report data", "reject:bad_signature", lambda: {"quote": flip(600)}),
    ("a changed enclave report", "reject:qe_signature", lambda: {"quote": flip(770)}),
    ("another attestation key", "reject:qe_binding", lambda: {"quote": flip(700)}),
    ("a key that the enclave did not bind", "reject:qe_binding", lambda: knobs(bind_attestation_key=False)),
    ("an enclave signed by another", "reject:qe_identity", lambda: knobs(qe_mrsigner=bytes(32))),
    ("an enclave in debug", "reject:qe_identity", lambda: knobs(qe_debug=True)),
    ("an enclave below its minimum", "reject:qe_identity", lambda: knobs(qe_isv_svn=1)),
    # chains
    ("a platform certificate from elsewhere", "reject:cert_chain", lambda: knobs(chain=authority().platform(NOW_MS).chain.replace("MII", "MIJ", 1))),
    ("a platform certificate not yet valid", "reject:cert_chain", lambda: knobs(chain=authority().platform(NOW_MS + 5 * DAY_MS).chain)),
    ("collateral signed by a platform's key", "reject:cert_chain", lambda: collateral(signer=platform())),
    ("levels signed by a platform's key", "reject:cert_chain", lambda: {"collateral": partly_by_a_platform("tcb_info")}),
    ("an identity signed by a platform's key", "reject:cert_chain", lambda: {"collateral": partly_by_a_platform("qe_identity")}),
    ("a dev quote under Intel's root", "reject:unknown_root", lambda: {"trust": {"anchors": (intel_anchor(),), "network_class": "dev"}, "policy": {"anchors": (INTEL_SGX_ROOT_SHA256,)}}),
    ("a root that the policy does not name", "reject:unknown_root", lambda: {"policy": {"anchors": (OTHER_32,)}}),
    ("a revoked platform", "reject:revoked", lambda: collateral(revoked_by_pck_ca=(certificate(),))),
    ("a revoked platform CA", "reject:revoked", lambda: collateral(revoked_by_root=(authority().pck_ca,))),
    ("a revoked TCB signer", "reject:revoked", lambda: collateral(revoked_by_root=(authority().tcb_signer,))),
    ("a revoked level", "reject:revoked", lambda: collateral(statuses=("Revoked", "Revoked", "Revoked"))),
    # collateral
    ("no collateral", "error:collateral_missing", lambda: {"evidence": {"collateral": None}}),
    ("collateral that is no JSON", "reject:collateral_malformed", lambda: {"collateral": "{"}),
    ("collateral that lacks a part", "reject:collateral_malformed", lambda: {"collateral": drop("pck_crl")}),
    ("collateral with an unknown part", "reject:collateral_malformed", lambda: {"collateral": put("extra", "")}),
    ("levels that are no JSON", "reject:collateral_malformed", lambda: {"collateral": put("tcb_info", "{}")}),
    ("a revocation list that is no DER", "reject:collateral_malformed", lambda: {"collateral": put("pck_crl", "00")}),
    ("something beside the signer's chain", "reject:cert_chain", lambda: {"collateral": edit("tcb_info_issuer_chain", "-----BEGIN", "x\n-----BEGIN")}),
    ("levels edited after signing", "reject:collateral_signature", lambda: {"collateral": edit("tcb_info", '"pcesvn":11', '"pcesvn":10')}),
    ("an identity edited after signing", "reject:collateral_signature", lambda: {"collateral": edit("qe_identity", '"isvsvn":4', '"isvsvn":1')}),
    ("collateral that has ended", "reject:collateral_expired", lambda: {**collateral(valid_days=1), "collateral_at_ms": NOW_MS - 2 * DAY_MS}),
    ("collateral that ends this second", "reject:collateral_expired", lambda: {**collateral(valid_days=1), "collateral_at_ms": NOW_MS - DAY_MS}),
    ("collateral from the future", "reject:collateral_not_yet_valid", lambda: {"collateral_at_ms": NOW_MS + DAY_MS}),
    ("a revocation list from the future", "reject:collateral_not_yet_valid", lambda: {"collateral": put("pck_crl", future_list())}),
    ("the very end of a grace", "reject:collateral_expired", lambda: {"level": OUT_OF_DATE, "policy": {"tdx": LAST_SECOND}}),
    ("collateral of SGX levels", "reject:collateral_wrong_type", lambda: collateral(tcb_id="SGX")),
    ("collateral of an SGX enclave", "reject:collateral_wrong_type", lambda: collateral(qe_id="QE")),
    ("collateral of another processor", "reject:fmspc_mismatch", lambda: {"fmspc": bytes.fromhex("de0000000002")}),
    ("a rolled back evaluation number", "reject:tcb_eval_number", lambda: {"floors": floor(evaluation_number=101)}),
    ("an evaluation number below the policy", "reject:tcb_eval_number", lambda: {"policy": {"tdx": TdxRules(min_evaluation_number=101)}}),
    ("a rolled back root list", "reject:crl_stale", lambda: {"floors": floor(root_crl_number=2)}),
    ("a rolled back platform list", "reject:crl_stale", lambda: {"floors": floor(pck_crl_number=2)}),
    # levels
    ("software hardening needed", "reject:tcb_status", lambda: {"level": SW_HARDENING}),
    ("out of date", "reject:tcb_status", lambda: {"level": OUT_OF_DATE}),
    ("an old TDX module", "reject:tcb_status", lambda: knobs(tee_tcb_svn=bytes((4, 1, 3)) + bytes(13))),
    ("an enclave that needs configuration", "reject:tcb_status", lambda: collateral(qe_status="ConfigurationNeeded")),
    ("out of date without a grace", "reject:tcb_grace", lambda: {"level": OUT_OF_DATE, "policy": {"tdx": NO_GRACE}}),
    ("out of date past the grace", "reject:tcb_grace", lambda: {"level": OUT_OF_DATE, "policy": {"tdx": SHORT_GRACE}}),
    ("an out of date enclave without a grace", "reject:tcb_grace", lambda: {**collateral(qe_status="OutOfDate"), "policy": {"tdx": GRACE}}),
    ("a platform below every level", "reject:tcb_unsupported", lambda: {"level": UNLISTED}),
    ("a module version that is not listed", "reject:tcb_unsupported", lambda: knobs(tee_tcb_svn=bytes((6, 9, 3)) + bytes(13))),
    ("a module of another signer", "reject:tcb_mismatch", lambda: knobs(mr_signer_seam=b"\1" * 48)),
    ("a refused advisory", "reject:advisory", lambda: {"level": SW_HARDENING, "policy": {"tdx": REFUSES_SA_2}}),
    ("a dynamic platform", "reject:policy_platform", lambda: {"level": DYNAMIC}),
    ("a platform with cached keys", "reject:policy_platform", lambda: {"level": CACHED}),
    ("a platform with SMT", "reject:policy_platform", lambda: {"level": SMT}),
    # the virtual machine
    ("a machine in debug", "reject:debug", lambda: knobs(td_attributes=bytes.fromhex("0100001000000000"))),
    ("a machine in debug under a policy that lists it", "reject:debug", lambda: {**knobs(td_attributes=bytes.fromhex("0100001000000000")), "policy": {"tdx": NO_DEBUG_RULE}}),
    ("a machine that is profiled", "reject:debug", lambda: knobs(td_attributes=bytes.fromhex("1000001000000000"))),
    ("a machine that takes exceptions from its host", "reject:td_attributes", lambda: knobs(td_attributes=bytes(8))),
    ("a machine that may migrate", "reject:td_attributes", lambda: knobs(td_attributes=bytes.fromhex("0000003000000000"))),
    ("attributes that the policy does not list", "reject:td_attributes", lambda: knobs(td_attributes=bytes.fromhex("0000005000000000"))),
    ("features that the policy does not list", "reject:td_attributes", lambda: knobs(xfam=bytes.fromhex("e718060000000000"))),
    ("a machine bound to a service machine", "reject:td_attributes", lambda: knobs(version=5, mr_service_td=b"\1" * 48)),
    ("another image", "reject:measurement", lambda: image(mr_td=OTHER_48)),
    ("another firmware register", "reject:measurement", lambda: image(rtmr0=OTHER_48)),
    ("another kernel register", "reject:measurement", lambda: image(rtmr1=OTHER_48)),
    ("another command line register", "reject:measurement", lambda: image(rtmr2=OTHER_48)),
    ("another run-time register", "reject:measurement", lambda: image(rtmr3=OTHER_48)),
    ("another configuration", "reject:measurement", lambda: image(mr_config_id=OTHER_48)),
    ("another owner", "reject:measurement", lambda: image(mr_owner=OTHER_48)),
    ("another owner's configuration", "reject:measurement", lambda: image(mr_owner_config=OTHER_48)),
    ("a policy without images", "reject:measurement", lambda: {"policy": {"images": ()}}),
    # the provider
    ("claims that the quote does not cover", "reject:report_data_mismatch", lambda: {"report_data": bytes(64)}),
    ("a challenge for another provider", "reject:nonce", lambda: {"evidence": {"provider_id": "prov_" + "b" * 32}}),
    ("a challenge from another checkpoint", "reject:nonce", lambda: {"evidence": {"checkpoint_root": OTHER_32}}),
    ("a challenge of another random part", "reject:nonce", lambda: {"evidence": {"challenge_random": OTHER_32}}),
    ("claims that begin in the future", "reject:claims_window", lambda: {"claims": {"not_before_ms": NOW_MS + HOUR_MS - 1}}),
    ("claims that have ended", "reject:claims_window", lambda: {"claims": {"not_after_ms": NOW_MS}}),
    ("evidence older than the policy allows", "reject:too_old", lambda: {"claims": {"not_before_ms": NOW_MS - 2 * HOUR_MS}}),
    ("a model that is not attested", "reject:models_mismatch", lambda: {"evidence": {"models": (MODEL, OTHER_32)}}),
    ("a model listed twice", "reject:models_mismatch", lambda: {"evidence": {"models": (MODEL, MODEL)}}),
    ("a model attested and listed twice", "reject:models_mismatch", lambda: {"claims": {"models_root": models_root([bytes.fromhex(MODEL)] * 2)}, "evidence": {"models": (MODEL, MODEL)}}),
    ("a model that is not on the list", "reject:model_denied", lambda: {"policy": {"models": (OTHER_32,)}}),
    ("GPU evidence claimed and not sent", "reject:gpu_missing", lambda: {"claims": {"gpu_evidence_hash": b"\1" * 32}}),
    ("GPU evidence required and not sent", "reject:gpu_missing", lambda: {"policy": {"gpu": GpuRules(required=True)}}),
    ("a banned platform", "reject:banned", lambda: {"policy": {"bans": Bans(ppids=(PPID.hex(),))}}),
    # whose rules
    ("a policy without signatures", "reject:policy_unsigned", lambda: {"signers": ()}),
    ("a policy signed by a stranger", "reject:policy_unsigned", lambda: {"signers": (bytes(32),)}),
    ("one signature given twice where two are asked", "reject:policy_unsigned", lambda: {"signers": (SIGNER, SIGNER), "trust": {"policy_threshold": 2}}),
    ("a threshold of nothing", "reject:policy_unsigned", lambda: {"trust": {"policy_threshold": 0}}),
    ("a policy of another network", "reject:policy_unsigned", lambda: {"policy": {"network_id": "other"}}),
    ("a dev root in production", "reject:dev_anchor", lambda: {"trust": {"network_class": "prod"}, "policy": {"network_class": "prod"}}),
    ("a dev root under a production policy", "reject:dev_anchor", lambda: {"policy": {"network_class": "prod"}}),
    ("a dev policy in production", "reject:dev_anchor", lambda: {"trust": {"network_class": "prod"}}),
    ("a dev policy over Intel's root in production", "reject:dev_anchor", lambda: {"trust": {"network_class": "prod", "anchors": (intel_anchor(),)}, "policy": {"anchors": (INTEL_SGX_ROOT_SHA256,)}}),
    # what cannot be decided
    ("AMD's evidence", "error:unsupported", lambda: {"evidence": {"tee": "snp"}}),
    ("a GPU report", "error:unsupported", lambda: {"evidence": {"gpu_reports": (b"report",)}}),
    ("a root that is no certificate", "error:key_missing", lambda: {"trust": {"anchors": (replace(authority().anchor, der=b"0"),)}}),
    ("a time before 1970", "error:clock", lambda: {"now_ms": -1}),
    ("a time that is none", "error:clock", lambda: {"now_ms": 2**80}),
]


@pytest.mark.parametrize(("expected", "scene"), [row[1:] for row in ACCEPTED], ids=[r[0] for r in ACCEPTED])
def test_good_evidence_is_accepted_as_simulated(expected: str, scene: Callable[[], dict[str, Any]]) -> None:
    verdict = Scene(**scene()).verdict()
    assert str(verdict) == expected, verdict.sentence
    assert verdict.assurance is Assurance.SIMULATED
    assert verdict.claims is not None
    assert verdict.valid_until_ms is not None
    assert verdict.valid_until_ms > NOW_MS


@pytest.mark.parametrize(("expected", "scene"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_evidence_is_refused_with_its_cause(expected: str, scene: Callable[[], dict[str, Any]]) -> None:
    verdict = Scene(**scene()).verdict()
    assert str(verdict) == expected, verdict.sentence
    assert not verdict.ok
    assert verdict.assurance is None
    assert verdict.valid_until_ms is None
    assert is_sentence(verdict.sentence)
    assert is_sentence(verdict.next_step)


def test_banned_evidence_is_refused_in_any_copy() -> None:
    scene = Scene()
    evidence = scene.provider_evidence()
    copy = evidence.model_copy(update={"quote": evidence.quote + b"tail"})
    banned = Scene(policy={"bans": Bans(evidence_ids=(evidence_id(TeeKind.TDX, copy.quote).hex(),))})
    for offered in (evidence, copy):
        verdict = verify_provider(offered, trust(), banned.signed_policy(), CollateralFloors(), NOW_MS)
        assert str(verdict) == "reject:banned"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"report": {"td_attributes": "0100001000000000"}}, "reject:debug"),
        ({"report": {"td_attributes": "4000001000000000"}}, "reject:debug"),
        ({"report": {"td_attributes": "1000001000000000"}}, "reject:debug"),
        ({"report": {"td_attributes": "8800001000000000"}}, "reject:td_attributes"),
        ({"current_status": "OutOfDate"}, "reject:tcb_status"),
        ({"current_status": "UpToDate"}, "ok:UpToDate"),
        ({"tee_type": 0}, "reject:not_tdx"),
        ({"report": None}, "reject:not_tdx"),
    ],
)
def test_what_the_library_might_stop_refusing_is_refused_here(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    real = qvl.appraise

    def lenient(*arguments: Any) -> Any:
        found = real(*arguments)
        assert isinstance(found, qvl.Appraisal)
        report = {**found.report, **changes["report"]} if changes.get("report") else {}
        return replace(found, **{**changes, **({"report": report} if "report" in changes else {})})

    monkeypatch.setattr(qvl, "appraise", lenient)
    verdict = Scene(policy={"tdx": NO_DEBUG_RULE}).verdict()
    assert str(verdict) == expected
    assert is_sentence(verdict.sentence)
    if expected == "reject:tcb_status":
        assert verdict.sentence.endswith("It is the status of the module that runs now.")


def test_a_text_that_the_library_never_said_before_is_a_refusal() -> None:
    assert code_of("Verification failed: the moon is in the wrong phase") == "refused"


def test_every_code_of_a_tdx_verdict_has_a_scenario() -> None:
    seen = {row[1].partition(":")[2] for row in REFUSED}
    elsewhere = {"refused", "event_digest", "rtmr_mismatch", "open_tier", "identity"}
    assert (codes.REJECTIONS.keys() | codes.ERRORS.keys()) - elsewhere == seen


def test_the_page_lists_every_code_with_its_remedy() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "attestation.md").read_text()
    for outcome, table in (("reject", codes.REJECTIONS), ("error", codes.ERRORS)):
        for name, code in table.items():
            assert f"| `{outcome}:{name}` | {code.sentence} | {code.next_step} |" in page


def test_no_verdict_can_carry_an_unknown_code() -> None:
    with pytest.raises(KeyError):
        reject("unheard_of")
    with pytest.raises(KeyError):
        fail("malformed")
    for change in ({"outcome": "ok"}, {"code": "nonce"}):
        with pytest.raises(ValueError, match="final", check=says_why):
            reject("malformed").with_(**change)
