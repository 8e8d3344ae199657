"""The shared TDX vectors: real quotes and collateral, each with the verdict it must get.

They are other projects' data, read from ../shared and never copied here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest

from cocoon.evidence.claims import TeeKind, evidence_id
from cocoon.evidence.eventlog import check_event_log
from cocoon.evidence.policy import Policy, TdxImage, TdxRules
from cocoon.evidence.tdx import verify_tdx
from cocoon.evidence.trust import TrustAnchors, anchor, intel_anchor

HOME = Path(__file__).resolve().parents[4] / "shared" / "vectors" / "attestation"
INDEX = HOME / "index.json"
ALL: list[dict[str, Any]] = json.loads(INDEX.read_bytes())["vectors"] if INDEX.exists() else []
VECTORS = [vector for vector in ALL if vector["kind"] in ("tdx", "sgx")]
EVENT_LOGS = [vector for vector in ALL if vector["kind"] == "rtmr-replay"]
COUNT = 61


def read(vector: dict[str, Any], part: str) -> bytes | None:
    path = vector["files"].get(part)
    return (HOME / path).read_bytes() if path else None


def images_of(quote: bytes) -> tuple[TdxImage, ...]:
    """The exam is not about which images are released: list the one in the quote."""
    try:
        report = dcap_qvl.parse_quote(quote).report
    except ValueError:
        return ()
    if isinstance(report, dcap_qvl.SgxEnclaveReport):
        return ()
    names = ("mr_td", "mr_config_id", "mr_owner", "mr_owner_config")
    fields = {name: getattr(report, name).hex() for name in names}
    registers = {f"rtmr{i}": getattr(report, f"rt_mr{i}").hex() for i in range(4)}
    return (TdxImage(name="exam", **fields, **registers),)


@pytest.mark.skipif(not VECTORS, reason="the shared vectors (../shared/vectors) are absent")
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_the_verdict_is_the_vectors(vector: dict[str, Any]) -> None:
    quote, collateral = read(vector, "quote"), read(vector, "collateral")
    assert quote is not None
    root = anchor(TeeKind.TDX, read(vector, "root") or b"") if vector["root"] == "dev" else None
    root = root or intel_anchor()
    rules = vector["policy"] or {}
    policy = Policy(
        network_id="exam",
        network_class="dev",
        version=1,
        anchors=(root.fingerprint,),
        images=images_of(quote),
        tdx=TdxRules(
            allowed_statuses=rules.get("allow", ()),
            platform_grace_s=rules.get("platform_grace", 0),
            min_evaluation_number=rules.get("min_eval", 0),
            refused_advisories=rules.get("reject_advisories", ()),
            allow_dynamic_platform=rules.get("dynamic_platform", True),
            allow_cached_keys=rules.get("cached_keys", True),
            allow_smt=rules.get("smt", True),
            xfam=("e702060000000000", "e718060000000000", "e700060000000000", "0702000000000000"),
        ),
    )
    trust = TrustAnchors("exam", "dev", (root,), (bytes(32),), 1, bytes(32))
    text = None if collateral is None else collateral.decode()
    verdict = verify_tdx(quote, text, trust, policy, (vector["now"] or 0) * 1000)
    assert str(verdict) == vector["expect"], verdict.sentence
    twin = vector.get("same_evidence_as")
    if twin:
        original = next(item for item in VECTORS if item["id"] == twin)
        assert verdict.evidence_id == evidence_id(TeeKind.TDX, read(original, "quote") or b"")


@pytest.mark.skipif(not VECTORS, reason="the shared vectors (../shared/vectors) are absent")
@pytest.mark.parametrize("vector", EVENT_LOGS, ids=lambda vector: vector["id"])
def test_the_event_logs_verdict_is_the_vectors(vector: dict[str, Any]) -> None:
    quote, log = read(vector, "quote"), read(vector, "eventlog")
    assert quote is not None
    assert log is not None
    (image,) = images_of(quote)
    registers = (image.rtmr0, image.rtmr1, image.rtmr2, image.rtmr3)
    assert str(check_event_log(log, registers) or "ok") == vector["expect"]


@pytest.mark.skipif(not VECTORS, reason="the shared vectors (../shared/vectors) are absent")
def test_the_whole_tdx_exam_was_taken() -> None:
    assert len(VECTORS) + len(EVENT_LOGS) == COUNT


def test_the_packaged_root_is_intels() -> None:
    found = intel_anchor()
    assert hashlib.sha256(found.der).hexdigest() == found.fingerprint
    assert not found.is_dev
