"""Write open-claims.json: evidence without a TEE, with every part that it is made of.

Run: python tests/vectors/make_open_claims.py. Everything in it is fixed; a second run writes the
same bytes. Test keys: never use them for anything else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "libs")]

from cocoon.evidence import claims as binding  # noqa: E402
from cocoon.evidence.claims import TeeKind  # noqa: E402
from cocoon.evidence.policy import Policy, policy_hash, sign  # noqa: E402
from tests.support.evidence_world import NETWORK, NOW_MS, SIGNER  # noqa: E402
from tests.support.open_world import IDENTITY, PROVIDER, RULES, OpenScene  # noqa: E402

OUT = Path(__file__).with_name("open-claims.json")


def main() -> None:
    evidence = OpenScene().provider_evidence()
    without = Policy(network_id=NETWORK, network_class="dev", version=1, anchors=())
    opened = without.model_copy(update={"open_tier": RULES})
    document = {
        "identity_seed": bytes(IDENTITY).hex(),
        "identity_key": bytes(IDENTITY.verify_key).hex(),
        "provider_id": PROVIDER,
        "claims": evidence.claims.hex(),
        "report_data": binding.report_data(evidence.claims).hex(),
        "statement": evidence.quote.hex(),
        "evidence_id": binding.evidence_id(TeeKind.NONE, evidence.quote).hex(),
        "evidence": evidence.model_dump(mode="json"),
        "policy_with": sign(opened, [SIGNER]).to_canonical().hex(),
        "policy_without": {
            "signed": sign(without, [SIGNER]).to_canonical().hex(),
            "hash": policy_hash(without).hex(),
        },
        "now_ms": NOW_MS,
        "verdict": "ok:open",
        "assurance": "open",
        "valid_until_ms": NOW_MS + 3_600_000,
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
