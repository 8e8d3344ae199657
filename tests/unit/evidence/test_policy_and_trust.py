"""The signed policy, the trust file and the floors: what a client starts from and never lowers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey
from pydantic import ValidationError

from cocoon.devnet.authority import OUT_OF_DATE, CollateralKnobs
from cocoon.evidence import policy as rules
from cocoon.evidence.claims import TeeKind
from cocoon.evidence.collateral import NO_FLOORS, CollateralFloor, CollateralFloors
from cocoon.evidence.policy import TdxRules, parse_policy, policy_hash, sign, verify
from cocoon.evidence.trust import intel_anchor, load_trust, parse_trust, trust_document
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import ConfigurationError
from tests.support.evidence_world import (
    CLAIMS,
    DAY_MS,
    FMSPC,
    HOUR_MS,
    NOW_MS,
    PPID,
    SIGNER,
    Scene,
    authority,
    policy,
    trust,
)
from tests.support.sentences import says_why

SEEDS = [bytes([i]) * 32 for i in range(1, 4)]
KEYS = [bytes(SigningKey(seed).verify_key) for seed in SEEDS]


def test_enough_different_signers_make_a_policy() -> None:
    signed = sign(policy(), SEEDS[:2])
    assert verify(signed, KEYS, 1)
    assert verify(signed, KEYS, 2)
    assert not verify(signed, KEYS, 3)
    assert not verify(signed, KEYS[1:], 2)
    assert not verify(signed, [], 0)


def test_what_others_signed_before_does_not_hide_a_signer() -> None:
    stranger, wrong, good = sign(policy(), SEEDS).signatures
    wrong = wrong.model_copy(update={"signature": good.signature})
    for signatures in ((stranger, good), (wrong, good), (stranger, wrong, good)):
        signed = sign(policy(), []).model_copy(update={"signatures": signatures})
        assert verify(signed, KEYS[1:], 1)
        assert not verify(signed, KEYS[1:], 2)


def test_a_policy_may_fill_its_bound() -> None:
    signed = sign(policy(), SEEDS)
    data = signed.to_canonical().ljust(512 * 1024)
    assert parse_policy(data) == signed
    with pytest.raises(ValueError, match="larger than 512 KiB", check=says_why):
        parse_policy(data + b" ")


def test_any_other_rule_under_the_same_signature_is_unsigned() -> None:
    signed = sign(policy(), SEEDS[:1])
    for change in ({"version": 2}, {"models": ()}, {"tdx": TdxRules(allow_smt=True)}):
        other = signed.model_copy(update={"policy": policy(**change)})
        assert not verify(other, KEYS, 1)
        assert policy_hash(other.policy) != policy_hash(signed.policy)


def test_a_policy_survives_the_wire_with_its_hash() -> None:
    signed = sign(policy(previous_hash="ab" * 32, facility_ppids=(PPID.hex(),)), SEEDS)
    read = parse_policy(signed.to_canonical())
    assert read == signed
    assert policy_hash(read.policy) == policy_hash(signed.policy)
    assert verify(read, KEYS, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"version": 0},
        {"anchors": ["AB" * 32]},
        {"tdx": {"allowed_statuses": ["Revoked"]}},
        {"tdx": {"allow_everything": True}},
        {"max_evidence_age_s": 0},
        {"network_class": "staging"},
    ],
    ids=json.dumps,
)
def test_a_policy_of_another_form_is_not_read(change: dict[str, Any]) -> None:
    document = json.loads(sign(policy(), SEEDS).to_canonical())
    document["policy"].update(change)
    with pytest.raises(ValueError, match="expected form at", check=says_why):
        parse_policy(json.dumps(document).encode())


def test_a_long_unknown_name_is_not_repeated_whole() -> None:
    document = json.loads(sign(policy(), SEEDS).to_canonical())
    with pytest.raises(ValueError, match="expected form at", check=says_why) as refused:
        parse_policy(json.dumps(document | {"z" * 5000: 1}).encode())
    assert "z" * 100 in str(refused.value)
    assert "z" * 101 not in str(refused.value)


def test_a_root_of_an_unknown_certificate_version_is_refused_like_any_other() -> None:
    document = json.loads(trust_document(trust()))
    der = authority().anchor.der.replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\4", 1)
    assert der != authority().anchor.der
    document["anchors"][0]["der"] = base64.b64encode(der).decode()
    with pytest.raises(ConfigurationError, match="not a certificate in DER", check=says_why):
        parse_trust(json.dumps(document).encode())


def test_a_policy_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        policy().version = 9


def test_the_trust_file_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(trust_document(trust()))
    assert load_trust(path) == trust()
    assert b"DEV ONLY" in path.read_bytes()


def test_a_trust_file_without_roots_means_the_vendors_own() -> None:
    document = production()
    assert parse_trust(json.dumps(document).encode()).anchors == (intel_anchor(),)


def production() -> dict[str, Any]:
    return {
        "format": 1,
        "network_id": "cocoon",
        "network_class": "prod",
        "policy_signers": [KEYS[0].hex(), KEYS[1].hex()],
        "policy_threshold": 2,
        "log_key": "00" * 32,
    }


def dev_root(name: str) -> dict[str, str]:
    der = base64.b64encode(authority().anchor.der).decode()
    return {"tee": "tdx", "name": name, "der": der}


def spoilt_root() -> dict[str, str]:
    """A root with a letter in it that is none of base64's."""
    root = dev_root("DEV ONLY root")
    return {**root, "der": f"{root['der'][:8]}!{root['der'][8:]}"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"anchors": [dev_root("DEV ONLY root")]}, "class prod"),
        ({"network_class": "dev"}, "notice"),
        ({"network_class": "dev", "notice": "DEV ONLY", "anchors": [dev_root("x")]}, "name must"),
        ({"anchors": [{"tee": "tdx", "name": "x", "der": "AAAA"}]}, "not a certificate"),
        ({"anchors": [{"tee": "tdx", "name": "x", "der": "?"}]}, "not a certificate"),
        ({"network_class": "dev", "notice": "DEV ONLY", "anchors": [spoilt_root()]}, "not a cert"),
        ({"anchors": [{"tee": "snp", "name": "x", "der": ""}]}, "anchors.0.tee"),
        ({"policy_threshold": 3}, "more policy signatures"),
        ({"policy_threshold": 0}, "policy_threshold"),
        ({"policy_signers": [KEYS[0].hex()] * 2}, "twice"),
        ({"policy_signers": []}, "policy_signers"),
        ({"extra": 1}, "extra"),
        ({"format": 2}, "format"),
    ],
)  # fmt: skip
def test_a_wrong_trust_file_says_where(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says, check=says_why):
        parse_trust(json.dumps({**production(), **change}).encode())


@given(st.binary(max_size=200))
def test_noise_is_no_trust_file(data: bytes) -> None:
    with pytest.raises(ConfigurationError, check=says_why):
        parse_trust(data)


def test_the_vendor_s_root_is_a_tdx_root_of_no_dev_network() -> None:
    root = intel_anchor()
    assert (root.tee, root.is_dev) == (TeeKind.TDX, False)
    written = json.loads(trust_document(parse_trust(json.dumps(production()).encode())))
    assert written["notice"] == ""
    (entry,) = written["anchors"]
    assert (entry["tee"], entry["name"]) == ("tdx", "Intel SGX Root CA")
    assert parse_trust(json.dumps(written).encode()).anchors == (root,)


def test_a_trust_file_may_fill_its_bound() -> None:
    data = json.dumps(production()).encode().ljust(64 * 1024)
    assert parse_trust(data).network_id == "cocoon"
    with pytest.raises(ConfigurationError, match="larger than 64 KiB", check=says_why):
        parse_trust(data + b" ")
    with pytest.raises(ConfigurationError, match="is not JSON", check=says_why):
        parse_trust(b"network: cocoon")


def test_a_missing_trust_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.json cannot be read", check=says_why):
        load_trust(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_bytes(b"[]")
    with pytest.raises(ConfigurationError, match=r"bad\.json", check=says_why):
        load_trust(tmp_path / "bad.json")


def test_a_listed_platform_would_be_a_facility_but_a_simulated_one_stays_simulated() -> None:
    verdict = Scene(policy={"facility_ppids": (PPID.hex(),)}).verdict()
    assert verdict.assurance is Assurance.SIMULATED


def test_a_verdict_raises_the_floors_that_refuse_older_collateral() -> None:
    newer = Scene(
        collateral=CollateralKnobs(evaluation_number=101, root_crl_number=5, pck_crl_number=6)
    )
    raised = newer.verdict().floors
    assert raised is not None
    assert raised.of(FMSPC) == CollateralFloor(
        evaluation_number=101, root_crl_number=5, pck_crl_number=6
    )
    assert str(Scene(floors=raised).verdict()) == "reject:tcb_eval_number"
    kept = CollateralFloors.model_validate_json(raised.to_canonical())
    assert str(Scene(floors=kept).verdict()) == "reject:tcb_eval_number"


def test_a_refused_machine_raises_the_floors_too() -> None:
    refused = Scene(policy={"images": ()}).verdict()
    assert str(refused) == "reject:measurement"
    assert refused.floors is not None
    assert refused.floors.of(FMSPC).evaluation_number == 100


@given(st.tuples(*[st.integers(0, 9)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_floors_only_rise(one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
    names = ("evaluation_number", "root_crl_number", "pck_crl_number")
    first = NO_FLOORS.raised(FMSPC, CollateralFloor(**dict(zip(names, one, strict=True))))
    second = first.raised(FMSPC, CollateralFloor(**dict(zip(names, two, strict=True))))
    expected = tuple(map(max, one, two))
    assert tuple(getattr(second.of(FMSPC), name) for name in names) == expected
    assert second.of("0" * 12) == CollateralFloor()


def test_floors_are_raised_for_their_own_processor_alone() -> None:
    seen = CollateralFloor(evaluation_number=5, root_crl_number=6, pck_crl_number=7)
    floors = NO_FLOORS.raised(FMSPC, seen)
    older = CollateralFloor(evaluation_number=4, root_crl_number=6, pck_crl_number=9)
    raised = floors.raised(FMSPC, older).raised("0" * 12, older)
    assert raised.of(FMSPC) == seen.model_copy(update={"pck_crl_number": 9})
    assert raised.of("0" * 12) == older
    assert floors.raised(FMSPC, CollateralFloor()) is floors


def test_the_validity_ends_with_whatever_ends_first() -> None:
    by_claims = Scene().verdict().valid_until_ms
    assert by_claims == CLAIMS.not_after_ms
    long = {"not_after_ms": NOW_MS + 90 * DAY_MS}
    by_age = Scene(claims=long).verdict().valid_until_ms
    assert by_age == CLAIMS.not_before_ms + policy().max_evidence_age_s * 1000
    by_collateral = Scene(
        claims=long,
        collateral=CollateralKnobs(valid_days=1),
        policy={"max_evidence_age_s": 30 * 86_400},
    ).verdict()
    assert by_collateral.valid_until_ms == NOW_MS - HOUR_MS + DAY_MS


@pytest.mark.parametrize(
    ("scene", "age_days", "grace_days"),
    [
        ({"level": OUT_OF_DATE}, 61, {"platform_grace_s": 62 * 86_400}),
        ({"collateral": CollateralKnobs(qe_status="OutOfDate")}, 10, {"qe_grace_s": 11 * 86_400}),
    ],
    ids=["platform", "enclave"],
)
def test_a_grace_ends_the_validity(
    scene: dict[str, Any], age_days: int, grace_days: dict[str, Any]
) -> None:
    tdx = TdxRules(allowed_statuses=("OutOfDate",), **grace_days)
    verdict = Scene(
        **scene,
        claims={"not_after_ms": NOW_MS + 90 * DAY_MS},
        policy={"tdx": tdx, "max_evidence_age_s": 30 * 86_400},
    ).verdict()
    assert str(verdict) == "ok:OutOfDate"
    assert verdict.valid_until_ms == NOW_MS - HOUR_MS - age_days * DAY_MS + (age_days + 1) * DAY_MS


def test_the_seed_of_the_tests_signs_their_policy() -> None:
    assert rules.verify(sign(policy(), [SIGNER]), trust().policy_signers, 1)
