"""Verify one Intel TDX quote: pure, offline, at an injected time, under given roots and rules.

The library proves the chain and the platform's level; this file closes what it leaves open:
roles of certificates, rollback, attributes, measurements, bans. It never raises for an input.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from cocoon.evidence import claims as binding
from cocoon.evidence import qvl
from cocoon.evidence.claims import TeeKind
from cocoon.evidence.collateral import (
    NO_FLOORS,
    Collateral,
    CollateralFloor,
    CollateralFloors,
    chain_der,
    parse_collateral,
)
from cocoon.evidence.policy import Policy, TdxImage, TdxRules
from cocoon.evidence.trust import Anchor, TrustAnchors
from cocoon.evidence.verdict import Assurance, TdxFacts, Verdict, accept, fail, reject

MAX_QUOTE_BYTES = 16 * 1024
_TEE_SGX, _TEE_TDX = 0x00, 0x81
_MAX_NOW_MS = 2**53
_OUT_OF_DATE = ("OutOfDate", "OutOfDateConfigurationNeeded")


@dataclass(frozen=True, slots=True)
class _Setting:
    trust: TrustAnchors
    policy: Policy
    now_ms: int
    floors: CollateralFloors


def verify_tdx(
    quote: bytes,
    collateral: str | None,
    trust: TrustAnchors,
    policy: Policy,
    now_ms: int,
    *,
    floors: CollateralFloors = NO_FLOORS,
) -> Verdict:
    """Verify a TDX quote (v4 or v5) with `collateral` (JSON text) at `now_ms` (Unix ms).

    An ok verdict proves hardware, level and image; it does not prove whose keys they are: bind
    `facts.report_data` to the claims (provider.py). `floors` refuse collateral older than was
    seen; persist the verdict's floors. Never raises for bad input.
    """
    if not 0 <= now_ms <= _MAX_NOW_MS:
        return fail("clock")
    if refusal := _check_form(quote):
        return refusal
    identity = binding.evidence_id(TeeKind.TDX, quote)
    if collateral is None:
        return fail("collateral_missing").with_(evidence_id=identity)
    try:
        parts = parse_collateral(collateral)
    except ValueError as error:
        detail = f"In detail: {error}."
        return reject("collateral_malformed", detail).with_(evidence_id=identity)
    setting = _Setting(trust, policy, now_ms, floors)
    return _under_some_anchor(quote, parts, setting).with_(evidence_id=identity)


def _check_form(quote: bytes) -> Verdict | None:
    """Bound the size and read the header before any parser sees the bytes."""
    if len(quote) > MAX_QUOTE_BYTES:
        return reject("malformed", "A quote has at most 16 KiB.")
    tee_type = int.from_bytes(quote[4:8], "little")
    if len(quote) >= 8 and tee_type == _TEE_SGX:
        return reject("not_tdx")
    try:
        binding.signed_part(TeeKind.TDX, quote)
    except ValueError as error:
        return reject("malformed", f"In detail: {error}.")
    return None if tee_type == _TEE_TDX else reject("malformed")


def _under_some_anchor(quote: bytes, collateral: Collateral, setting: _Setting) -> Verdict:
    """Verify under the one root that the evidence leads to; roots are few (trust file: 4)."""
    trust, policy = setting.trust, setting.policy
    for anchor in trust.anchors:
        if anchor.tee is not TeeKind.TDX or anchor.fingerprint not in policy.anchors:
            continue
        found = qvl.appraise(quote, collateral, anchor.der, policy.tdx, setting.now_ms // 1000)
        if found == "unknown_root":
            continue
        if anchor.is_dev and not (trust.is_dev and policy.network_class == "dev"):
            return reject("dev_anchor")
        if isinstance(found, str):
            return fail(found) if found == "key_missing" else reject(found)
        return _judge(quote, collateral, found, anchor, setting)
    return reject("unknown_root")


def _judge(
    quote: bytes,
    collateral: Collateral,
    found: qvl.Appraisal,
    anchor: Anchor,
    setting: _Setting,
) -> Verdict:
    """What the library does not check, on a quote whose chain it has proved."""
    if found.tee_type != _TEE_TDX or not found.report:
        return reject("not_tdx")
    if not (
        _signed_by_root_child(collateral.tcb_info_issuer_chain, anchor)
        and _signed_by_root_child(collateral.qe_identity_issuer_chain, anchor)
    ):
        return reject("cert_chain", "The collateral's signer is not the vendor's TCB signer.")
    policy, now_ms, floors = setting.policy, setting.now_ms, setting.floors
    if found.latest_issue_s * 1000 > now_ms:
        return reject("collateral_not_yet_valid")
    facts = _facts(found, anchor)
    if refusal := _below_floor(found, floors.of(found.fmspc)):
        return refusal.with_(facts=facts)
    seen = CollateralFloor(
        evaluation_number=found.evaluation_number,
        root_crl_number=found.root_crl_number,
        pck_crl_number=found.pck_crl_number,
    )
    raised = floors.raised(found.fmspc, seen)
    identity = binding.evidence_id(TeeKind.TDX, quote).hex()
    refusal = _check_machine(found, policy, identity)
    if refusal:
        return refusal.with_(facts=facts, floors=raised)
    image = _image_of(found.report, policy.images)
    if image is None:
        return reject("measurement").with_(facts=facts, floors=raised)
    facts = dataclasses.replace(facts, image=image.name)
    valid_until_ms = _valid_until_ms(found, policy.tdx)
    if valid_until_ms <= now_ms:  # the library counts whole seconds
        return reject("collateral_expired").with_(facts=facts, floors=raised)
    verdict = accept(found.tcb_status, _assurance(found, anchor, policy), valid_until_ms)
    return verdict.with_(facts=facts, floors=raised)


def _signed_by_root_child(pem_chain: str, anchor: Anchor) -> bool:
    """Whether the chain's first certificate was issued by the root itself.

    The library takes any leaf under the root as the signer of TCB info, so the key of one
    extracted platform could sign levels for all. Intel's TCB signer hangs directly under the
    root; platform certificates hang under a platform CA.
    """
    try:
        certificates = chain_der(pem_chain)
        leaf = x509.load_der_x509_certificate(certificates[0])
    except (ValueError, IndexError, x509.InvalidVersion):
        return False
    return leaf.issuer.public_bytes() == anchor.subject


def _below_floor(found: qvl.Appraisal, floor: CollateralFloor) -> Verdict | None:
    if found.evaluation_number < floor.evaluation_number:
        return reject("tcb_eval_number", "A greater number was seen before.")
    if found.root_crl_number < floor.root_crl_number or found.pck_crl_number < floor.pck_crl_number:
        return reject("crl_stale")
    return None


def _check_machine(found: qvl.Appraisal, policy: Policy, identity: str) -> Verdict | None:
    """Levels that the library does not converge, attributes and bans."""
    taken = ("UpToDate", *policy.tdx.allowed_statuses)
    # The library refuses an out-of-date enclave past its grace, but passes other statuses of it.
    if found.qe_status not in (*taken, "OutOfDate"):
        return reject("tcb_status", "It is the quoting enclave's status.")
    if found.current_status is not None and found.current_status not in taken:
        return reject("tcb_status", "It is the status of the module that runs now.")
    attributes = found.report["td_attributes"]
    if int(attributes[:2], 16) & 0x71:  # debug and profiling, whatever a policy lists
        return reject("debug")
    if attributes not in policy.tdx.td_attributes or found.report["xfam"] not in policy.tdx.xfam:
        return reject("td_attributes")
    if found.ppid in policy.bans.ppids or identity in policy.bans.evidence_ids:
        return reject("banned")
    return None


def _image_of(report: dict[str, str], images: tuple[TdxImage, ...]) -> TdxImage | None:
    measured = tuple(
        report[name]
        for name in (
            "mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3",
            "mr_config_id", "mr_owner", "mr_owner_config",
        )
    )  # fmt: skip
    for image in images:
        if measured == (
            image.mr_td, image.rtmr0, image.rtmr1, image.rtmr2, image.rtmr3,
            image.mr_config_id, image.mr_owner, image.mr_owner_config,
        ):  # fmt: skip
            return image
    return None


def _assurance(found: qvl.Appraisal, anchor: Anchor, policy: Policy) -> Assurance:
    if anchor.is_dev:
        return Assurance.SIMULATED
    if found.ppid in policy.facility_ppids:
        return Assurance.FACILITY
    return Assurance.ATTESTED


def _valid_until_ms(found: qvl.Appraisal, rules: TdxRules) -> int:
    """The end of the collateral, the certificates and any grace, whichever comes first."""
    ends_s = [found.earliest_expiration_s]
    if found.platform_status in _OUT_OF_DATE and found.tcb_status in _OUT_OF_DATE:
        ends_s.append(found.tcb_date_s + rules.platform_grace_s)
    if found.qe_status == "OutOfDate":
        qe_date = datetime.fromisoformat(found.qe_date)
        ends_s.append(int(qe_date.timestamp()) + rules.qe_grace_s)
    return min(ends_s) * 1000


def _facts(found: qvl.Appraisal, anchor: Anchor) -> TdxFacts:
    report = found.report
    return TdxFacts(
        quote_version=found.quote_version,
        mr_td=report["mr_td"],
        rtmrs=(report["rt_mr0"], report["rt_mr1"], report["rt_mr2"], report["rt_mr3"]),
        mr_config_id=report["mr_config_id"],
        mr_owner=report["mr_owner"],
        mr_owner_config=report["mr_owner_config"],
        mr_seam=report["mr_seam"],
        td_attributes=report["td_attributes"],
        xfam=report["xfam"],
        report_data=report["report_data"],
        ppid=found.ppid,
        fmspc=found.fmspc,
        tcb_status=found.tcb_status,
        tcb_date_ms=found.tcb_date_s * 1000,
        advisories=found.advisories,
        evaluation_number=found.evaluation_number,
        root_fingerprint=anchor.fingerprint,
    )
