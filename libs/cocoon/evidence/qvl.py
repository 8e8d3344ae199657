"""The only code that knows the quote library: one call in, an appraisal or a code out.

The library's own policy decides the platform's level; causes that it hides are asked for again.
It checks no report data, measurement, XFAM, freshness or rollback: those are ours (tdx.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import dcap_qvl

from cocoon.evidence.collateral import Collateral
from cocoon.evidence.policy import TdxRules

# Order matters: the first text found wins, and an outer text may stand before its cause.
_TEXTS: Final[tuple[tuple[str, str], ...]] = (
    ("CrlExpired", "collateral_expired"),
    ("CertRevoked", "revoked"),
    ("Failed to load root ca", "key_missing"),
    ("Failed to parse root CA CRL\n\nCaused by:\n    InvalidCrlSignature", "unknown_root"),
    ("Failed to parse root CA CRL", "collateral_malformed"),
    ("Failed to parse PCK CRL", "collateral_malformed"),
    # the quote's form
    ("Failed to decode quote", "malformed"),
    ("Unsupported DCAP quote version", "malformed"),
    ("Unknown QE vendor ID", "malformed"),
    ("Invalid TEE type", "malformed"),
    ("TEE quote must have version", "malformed"),
    ("Unsupported DCAP attestation key type", "malformed"),
    ("Unsupported DCAP PCK cert format", "malformed"),
    ("Failed to extract PCK certificates", "malformed"),
    ("Certificate chain is too short in quote", "malformed"),
    ("Invalid QE auth data length", "malformed"),
    ("Failed to decode QE report", "malformed"),
    ("Failed to get signed quote scope", "malformed"),
    # collateral
    ("issue date is in the future", "collateral_not_yet_valid"),
    ("TCBInfo expired", "collateral_expired"),
    ("QE Identity expired", "collateral_expired"),
    ("Collateral expired", "collateral_expired"),
    ("Failed to decode TcbInfo", "collateral_malformed"),
    ("Failed to decode QeIdentity", "collateral_malformed"),
    ("Failed to parse TCB Info", "collateral_malformed"),
    ("Failed to parse QE Identity", "collateral_malformed"),
    ("Certificate chain is too short for", "collateral_malformed"),
    ("Failed to parse certs", "collateral_malformed"),
    ("Failed to decode TCB FMSPC", "collateral_malformed"),
    ("for claims", "collateral_malformed"),
    ("component count mismatch", "collateral_malformed"),
    ("Unrecognized TCB status", "collateral_malformed"),
    ("has invalid length", "collateral_malformed"),
    ("as hex: ", "collateral_malformed"),
    ("missing tdxModule field", "collateral_malformed"),
    ("No TCB levels found in QE Identity", "collateral_malformed"),
    ("tcbDate", "collateral_malformed"),
    ("TCB date", "collateral_malformed"),
    ("Signature is invalid for tcb_info", "collateral_signature"),
    ("Signature is invalid for qe_identity", "collateral_signature"),
    ("InvalidCrlSignatureForPublicKey", "collateral_signature"),
    ("Unsupported QE Identity id/version", "collateral_wrong_type"),
    ("non-TDX TCB info", "collateral_wrong_type"),
    ("UnknownRevocationStatus", "collateral_wrong_type"),  # no list speaks for the certificate
    # the chain
    ("UnknownIssuer", "unknown_root"),
    ("Failed to verify certificate chain", "cert_chain"),
    ("Too many intermediate certificates", "cert_chain"),
    ("Failed to parse PCK certificate", "cert_chain"),
    ("Failed to decode certificate", "cert_chain"),
    ("Intel extension", "cert_chain"),
    # the quoting enclave, before the texts that both reports share
    ("Signature is invalid for qe_report", "qe_signature"),
    ("QE report hash mismatch", "qe_binding"),
    ("QE report validation failed", "qe_identity"),
    ("QE MRSIGNER", "qe_identity"),
    ("QE ISVPRODID", "qe_identity"),
    ("QE MISCSELECT", "qe_identity"),
    ("QE ATTRIBUTES", "qe_identity"),
    ("QE ISVSVN", "qe_identity"),
    ("ISV enclave report signature", "bad_signature"),
    # the platform's level
    ("Fmspc mismatch", "fmspc_mismatch"),
    ("TDX module MRSIGNER mismatch", "tcb_mismatch"),
    ("TDX module SEAMATTRIBUTES", "tcb_mismatch"),
    ("No matching TCB level found", "tcb_unsupported"),
    ("TDX module ISVSVN", "tcb_unsupported"),
    ("No TDX module identity", "tcb_unsupported"),
    ("TCB status is invalid: Revoked", "revoked"),
    # the virtual machine's attributes
    ("Debug mode is enabled", "debug"),
    ("TD profiling is enabled", "debug"),
    ("TD attributes", "td_attributes"),
    ("TD migration is enabled", "td_attributes"),
    ("SERVTD_EXT is enabled", "td_attributes"),
    ("SEPT_VE_DISABLE is not enabled", "td_attributes"),
    ("Invalid MR service TD", "td_attributes"),
    # the policy handed to the library
    ("is not acceptable by policy", "tcb_status"),
    ("TCB too old", "tcb_grace"),
    ("is rejected by policy", "advisory"),
    ("TCB eval data number", "tcb_eval_number"),
    ("allowed by policy", "policy_platform"),
)
_REPORT_FIELDS = ("TD10", "TD15", "TD15Ex")


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What the library found in an authentic quote. Hex strings are lower case; times Unix s."""

    quote_version: int
    tee_type: int
    report: dict[str, str]  # the fields of the TD report 1.0, as the library names them
    tcb_status: str  # platform, module and enclave together
    platform_status: str  # of the platform's matched level alone, which tcb_date_s dates
    tcb_date_s: int
    qe_status: str
    qe_date: str  # RFC 3339
    current_status: str | None  # TD report 1.5: the level that runs now
    advisories: tuple[str, ...]
    evaluation_number: int
    root_crl_number: int
    pck_crl_number: int
    ppid: str
    fmspc: str
    latest_issue_s: int
    earliest_expiration_s: int


def appraise(
    quote: bytes, collateral: Collateral, root_der: bytes, rules: TdxRules, now_s: int
) -> Appraisal | str:
    """Verify a quote's whole chain at `now_s` under one root.

    Returns the appraisal, or the code of the refusal; it does not raise for any input.
    """
    try:
        parts = _parts(collateral)
        verifier = dcap_qvl.QuoteVerifier(root_der)
        appraised = verifier.verify_with_policy(quote, parts, now_s, _library_policy(rules, now_s))
        return _read(json.loads(appraised.to_json()))
    except ValueError as refusal:
        return code_of(_cause(quote, collateral, root_der, now_s) or str(refusal))
    except (KeyError, TypeError, OverflowError):
        return "refused"
    except BaseException as stopped:  # noqa: BLE001 - re-raised unless a panic
        return _panic_code(stopped)


def code_of(text: str) -> str:
    """The code for a library's text; `refused` for one that this version does not know."""
    return next((code for part, code in _TEXTS if part in text), "refused")


def _panic_code(stopped: BaseException) -> str:
    """A panic inside the library arrives as a BaseException of its own: it is a refusal."""
    if type(stopped).__name__ != "PanicException":
        raise stopped
    return "refused"


def _cause(quote: bytes, collateral: Collateral, root_der: bytes, now_s: int) -> str:
    """The full text of a failure of the chain, or "" where only the policy refused."""
    try:
        dcap_qvl.verify_with_root_ca(quote, _parts(collateral), root_der, now_s)
    except ValueError as refusal:
        return str(refusal)
    except BaseException as stopped:  # noqa: BLE001 - re-raised unless a panic
        _panic_code(stopped)
    return ""


def _parts(collateral: Collateral) -> Any:
    return dcap_qvl.QuoteCollateralV3(
        collateral.pck_crl_issuer_chain,
        bytes.fromhex(collateral.root_ca_crl),
        bytes.fromhex(collateral.pck_crl),
        collateral.tcb_info_issuer_chain,
        collateral.tcb_info,
        bytes.fromhex(collateral.tcb_info_signature),
        collateral.qe_identity_issuer_chain,
        collateral.qe_identity,
        bytes.fromhex(collateral.qe_identity_signature),
    )


def _library_policy(rules: TdxRules, now_s: int) -> Any:
    policy = (
        dcap_qvl.QuotePolicy.strict(now_s)
        .platform_grace_period(rules.platform_grace_s)
        .qe_grace_period(rules.qe_grace_s)
        .min_tcb_eval_data_number(rules.min_evaluation_number)
        .reject_advisories(list(rules.refused_advisories))
        .allow_dynamic_platform(rules.allow_dynamic_platform)
        .allow_cached_keys(rules.allow_cached_keys)
        .allow_smt(rules.allow_smt)
    )
    for status in rules.allowed_statuses:
        policy = policy.allow_status(status)
    return policy


def _read(found: dict[str, Any]) -> Appraisal:
    """Take what we use from the library's JSON. KeyError or TypeError if its form changed."""
    ((kind, report),) = found["report"].items()
    if kind not in _REPORT_FIELDS:
        report = {}  # not a TD report: the caller refuses it by its TEE type
    while "base" in report:
        report = report["base"]
    platform, qe = found["platform"], found["qe"]
    current = platform["current_tcb_level"]
    return Appraisal(
        quote_version=found["header"]["version"],
        tee_type=found["tee_type"],
        report=report,
        tcb_status=found["tcb"]["status"],
        platform_status=platform["tcb_level"]["tcbStatus"],
        tcb_date_s=platform["tcb_date_tag"],
        qe_status=qe["tcb_level"]["tcbStatus"],
        qe_date=qe["tcb_level"]["tcbDate"],
        current_status=current["tcbStatus"] if current else None,
        advisories=tuple(found["tcb"]["advisory_ids"]),
        evaluation_number=found["tcb"]["eval_data_number"],
        root_crl_number=platform["root_ca_crl_num"],
        pck_crl_number=platform["pck_crl_num"],
        ppid=bytes(platform["pck"]["ppid"]).hex(),
        fmspc=bytes(platform["pck"]["fmspc"]).hex(),
        latest_issue_s=found["latest_issue_date"],
        earliest_expiration_s=found["earliest_expiration_date"],
    )
