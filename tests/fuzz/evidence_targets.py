"""What proves a provider under fire: quotes, collateral, claims, policies, trust files and signed
checkpoints. A verifier never raises; nobody is believed whom the development authority did not
sign, and no malleable byte gives evidence a second identity."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from nacl.signing import SigningKey

from cocoon.evidence import policy as rules
from cocoon.evidence.checkpoint import Checkpoint, key_hash, open_checkpoint
from cocoon.evidence.claims import Claims, TeeKind, evidence_id, report_data
from cocoon.evidence.codes import ERRORS, REJECTIONS
from cocoon.evidence.collateral import NO_FLOORS, chain_der, parse_collateral
from cocoon.evidence.eventlog import check_event_log
from cocoon.evidence.open_tier import verify_statement
from cocoon.evidence.policy import OpenTierRules, SignedPolicy, parse_policy, sign
from cocoon.evidence.provider import ProviderEvidence, parse_evidence, verify_provider
from cocoon.evidence.tdx import MAX_QUOTE_BYTES, verify_tdx
from cocoon.evidence.trust import TrustAnchors, parse_trust, trust_document
from cocoon.evidence.verdict import Assurance, Verdict
from cocoon.kernel.errors import ConfigurationError, EvidenceRejected

CORPUS = Path(__file__).parent / "corpus"
NOW_MS = 1_790_000_000_000  # when the corpus's evidence was made
LOG_ORIGIN = "cocoon.test/log"
LOG_KEY = SigningKey(hashlib.sha256(b"fuzzed log").digest())
LOG_NAME = "cocoon.test/log-key"
MAX_SENTENCE = 400
ZEROS_48 = ["00" * 48] * 4


@cache
def trust() -> TrustAnchors:
    return parse_trust((CORPUS / "trust_file" / "development").read_bytes())


@cache
def signed_policy() -> SignedPolicy:
    return parse_policy((CORPUS / "policy" / "development").read_bytes())


@cache
def evidence() -> ProviderEvidence:
    return parse_evidence((CORPUS / "provider_evidence" / "honest").read_bytes())


@cache
def open_evidence() -> ProviderEvidence:
    return parse_evidence((CORPUS / "provider_evidence" / "open").read_bytes())


@cache
def open_policy() -> SignedPolicy:
    """The development policy with an open tier, signed by the same signer."""
    rules = OpenTierRules(allowed=True, max_running_jobs=1, max_job_nanoton=1, max_providers=1)
    policy = signed_policy().policy.model_copy(update={"open_tier": rules})
    return sign(policy, [bytes(range(32))])


def _told(sentence: str) -> None:
    assert len(sentence) < MAX_SENTENCE, "a refusal repeats its input"


def _judged(verdict: Verdict) -> None:
    """A verdict has a known code and a sentence; an ok one is of the one honest quote."""
    assert verdict.ok or verdict.code in {**REJECTIONS, **ERRORS}
    _told(verdict.sentence)
    if verdict.ok:
        assert verdict.evidence_id == evidence_id(TeeKind.TDX, evidence().quote)
        assert verdict.valid_until_ms is not None
        assert verdict.valid_until_ms > NOW_MS


def tdx_quote(data: bytes) -> None:
    verdict = verify_tdx(data, evidence().collateral, trust(), signed_policy().policy, NOW_MS)
    _judged(verdict)
    assert len(data) <= MAX_QUOTE_BYTES or verdict.code == "malformed"


def collateral(data: bytes) -> None:
    """Collateral as text, alone and with the honest quote; PEM chains hold certificates only."""
    text = data.decode("utf-8", "replace")
    try:
        found = parse_collateral(text)
    except ValueError:
        found = None
    for chain in (text, found.tcb_info_issuer_chain if found else ""):
        try:
            assert all(chain_der(chain))
        except ValueError:
            continue
    if found is not None:
        quote = evidence().quote
        _judged(verify_tdx(quote, text, trust(), signed_policy().policy, NOW_MS))


def provider_evidence(data: bytes) -> None:
    try:
        found = parse_evidence(data)
    except EvidenceRejected as error:
        _told(error.message)
        return
    assert parse_evidence(found.to_canonical()) == found
    verdict = verify_provider(found, trust(), signed_policy(), NO_FLOORS, NOW_MS)
    _judged(verdict)
    if verdict.ok:
        assert found.claims == evidence().claims
        assert found.models == evidence().models
    verdict = verify_provider(found, trust(), open_policy(), NO_FLOORS, NOW_MS)
    if verdict.assurance is Assurance.OPEN:
        assert (str(verdict), found) == ("ok:open", open_evidence())
    else:
        _judged(verdict)


def open_statement(data: bytes) -> None:
    """Only the one that the provider's own key signed is taken, and only as open."""
    honest = open_evidence()
    verdict, covered = verify_statement(data, honest.provider_id, open_policy().policy, NOW_MS)
    _told(verdict.sentence)
    assert verdict.ok == (data == honest.quote)
    if verdict.ok:
        assert verdict.assurance is Assurance.OPEN
        assert covered == report_data(honest.claims).hex()
    else:
        assert verdict.code in REJECTIONS


def claims(data: bytes) -> None:
    try:
        found = Claims.decode(data)
    except ValueError:
        return
    assert found.encode() == data, "the claims have a second form"


def event_log(data: bytes) -> None:
    """No log but the empty one replays to registers of zeros."""
    verdict = check_event_log(data, ZEROS_48)
    if verdict is None:
        assert json.loads(data) == []
    else:
        assert verdict.code in REJECTIONS


def policy(data: bytes) -> None:
    """What parses has one canonical form; only the development signer's own is believed."""
    try:
        found = parse_policy(data)
    except ValueError as error:
        _told(str(error))
        return
    assert parse_policy(found.to_canonical()) == found
    if rules.verify(found, trust().policy_signers, trust().policy_threshold):
        assert found.policy == signed_policy().policy


def trust_file(data: bytes) -> None:
    """What parses can be written and means the same."""
    try:
        found = parse_trust(data)
    except ConfigurationError as error:
        _told(error.message)
        return
    assert parse_trust(trust_document(found)) == found
    assert found.is_dev or not any(anchor.is_dev for anchor in found.anchors)


def sign_note(body: bytes, key: SigningKey = LOG_KEY) -> bytes:
    """A C2SP signed note over `body`, which ends in a newline."""
    identity = key_hash(LOG_NAME, bytes(key.verify_key))
    blob = identity + key.sign(body).signature
    return body + f"\n\u2014 {LOG_NAME} {base64.b64encode(blob).decode()}\n".encode()


def signed_checkpoint(data: bytes) -> None:
    """A note as it comes, and the fuzzer's own body signed by the log's key."""
    keys = {LOG_NAME: bytes(LOG_KEY.verify_key)}
    for note, is_signed in ((data, False), (sign_note(data), True)):
        try:
            found = open_checkpoint(note, LOG_ORIGIN, keys, 1)
        except ValueError as error:
            _told(str(error))
            continue
        assert isinstance(found, Checkpoint)
        assert found.size >= 0
        assert len(found.root) == 32
        root = base64.b64encode(found.root)
        body = b"%b\n%d\n%b\n" % (LOG_ORIGIN.encode(), found.size, root)
        assert not is_signed or note.startswith(body), "the checkpoint has a second form"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tdx_quote": tdx_quote,
    "collateral": collateral,
    "provider_evidence": provider_evidence,
    "open_statement": open_statement,
    "claims": claims,
    "event_log": event_log,
    "policy": policy,
    "trust_file": trust_file,
    "signed_checkpoint": signed_checkpoint,
}
