"""Providers that a client must not use, however the gateway offers them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from nacl.signing import SigningKey

from cocoon.client import NetworkOptions, directory, openai_client
from cocoon.devnet.authority import DevAuthority, dev_policy, dev_trust
from cocoon.evidence.policy import sign
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import ConfigurationError
from cocoon.sealing import KeyBundle, KeyRing, parse_header
from tests.support.client_world import (
    KEY,
    NETWORK,
    POLICY_SIGNER,
    TEXT,
    Counting,
    Enclave,
    TestNetwork,
    authority,
    now_ms,
    served,
    trust,
)

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world


def ask(network: TestNetwork, **more: Any) -> Any:
    chosen = NetworkOptions(
        **{"gateway_url": network.url, "trust": trust(), "api_key": KEY, **more}
    )
    with openai_client(chosen, max_retries=0) as client:
        return client.chat.completions.create(**ASK)


def refused(network: TestNetwork, code: str, match: str | None = None, **more: Any) -> None:
    with pytest.raises(openai.InternalServerError, match=match) as caught:
        ask(network, **more)
    assert caught.value.status_code == 502
    assert caught.value.code == code
    assert network.seen == []  # nothing was sealed, nothing was sent


def test_evidence_under_another_root_is_refused_by_provider_and_check(
    network: TestNetwork,
) -> None:
    signer = bytes(POLICY_SIGNER.verify_key)
    others = dev_trust(DevAuthority.create(now_ms()), NETWORK, signer, bytes(32))
    refused(network, "unknown_root", network.enclaves[0].provider_id, trust=others)


def test_a_policy_that_the_trust_files_signers_did_not_sign_is_refused(
    network: TestNetwork,
) -> None:
    network.signed = sign(dev_policy(authority(), NETWORK), [secrets.token_bytes(32)])
    refused(network, "policy_unsigned")


def test_another_networks_policy_is_refused(network: TestNetwork) -> None:
    network.signed = sign(dev_policy(authority(), "another"), [bytes(POLICY_SIGNER)])
    refused(network, "policy_unsigned")


def test_keys_in_claims_that_the_quote_does_not_cover_are_refused(network: TestNetwork) -> None:
    """A gateway that swaps in its own key gets nothing."""
    enclave = network.enclaves[0]
    mine = SigningKey(secrets.token_bytes(32))
    claims = bytearray(enclave.evidence.claims)
    claims[40:72] = bytes(mine.verify_key)
    enclave.evidence = enclave.evidence.model_copy(update={"claims": bytes(claims)})
    refused(network, "report_data_mismatch")


def test_a_bundle_that_the_attested_key_did_not_sign_is_refused(network: TestNetwork) -> None:
    enclave = network.enclaves[0]
    mine = SigningKey(secrets.token_bytes(32))
    at = now_ms()
    pk = KeyRing().add(secrets.token_bytes(32))
    enclave.bundle = KeyBundle(pk, 1, at, at + 600_000, enclave.evidence_id).sign(mine)
    refused(network, "receipt_sig")


def test_an_ended_bundle_is_refused(network: TestNetwork) -> None:
    enclave = network.enclaves[0]
    at = now_ms()
    enclave.bundle = KeyBundle(
        enclave.x25519_pk, 1, at - 600_000, at - 1, enclave.evidence_id
    ).sign(enclave.signer)
    refused(network, "expired")


def test_evidence_shown_under_another_providers_name_is_refused(network: TestNetwork) -> None:
    enclave = network.enclaves[0]
    enclave.provider_id = "prov_" + "f" * 32
    refused(network, "nonce")


def test_a_model_that_the_quote_does_not_cover_is_refused(network: TestNetwork) -> None:
    enclave = network.enclaves[0]
    enclave.quote = enclave.quote.model_copy(update={"model_id": "ab" * 32})
    refused(network, "models_mismatch")


def test_a_pinned_model_must_have_its_id(network: TestNetwork) -> None:
    refused(network, "model_pin", model_pins={"skills-1": "ab" * 32})


def test_simulated_hardware_is_refused_where_real_hardware_is_asked_for(
    network: TestNetwork,
) -> None:
    refused(network, "assurance", assurances=[Assurance.FACILITY, Assurance.ATTESTED])


def test_a_production_trust_file_refuses_a_dev_network(network: TestNetwork) -> None:
    prod = replace(trust(), network_class="prod")
    refused(network, "dev_anchor", trust=prod)


def test_one_bad_provider_does_not_spoil_the_good_ones(network: TestNetwork) -> None:
    bad = Enclave()
    bad.evidence = bad.evidence.model_copy(update={"challenge_random": "00" * 32})
    network.enclaves.append(bad)
    assert ask(network).choices[0].message.content == TEXT
    header, _ = parse_header(network.seen[0])
    assert len(header.key_ids) == 1


def test_a_request_is_sealed_to_three_providers_at_most(network: TestNetwork) -> None:
    network.enclaves += [Enclave() for _ in range(4)]
    ask(network)
    header, _ = parse_header(network.seen[0])
    assert len(header.key_ids) == 3


def test_an_older_policy_is_refused_even_after_a_restart(
    network: TestNetwork, tmp_path: Path
) -> None:
    old = network.signed
    network.signed = sign(dev_policy(authority(), NETWORK, version=2), [bytes(POLICY_SIGNER)])
    ask(network, state_dir=tmp_path)
    network.signed = old
    network.seen.clear()
    refused(network, "policy_rollback", state_dir=tmp_path)
    assert (tmp_path / "trust-state.json").stat().st_mode & 0o777 == 0o600


def test_an_unsigned_policy_does_not_raise_the_version_that_is_remembered(
    network: TestNetwork, tmp_path: Path
) -> None:
    """Or a gateway could lock a client out of its own network."""
    genuine = network.signed
    forged = dev_policy(authority(), NETWORK, version=9)
    network.signed = sign(forged, [secrets.token_bytes(32)])
    refused(network, "policy_unsigned", state_dir=tmp_path)
    network.signed = genuine
    assert ask(network, state_dir=tmp_path).choices[0].message.content == TEXT


def test_older_collateral_is_refused_even_after_a_restart(
    network: TestNetwork, tmp_path: Path
) -> None:
    from cocoon.devnet.authority import CollateralKnobs

    enclave = network.enclaves[0]
    fresh = enclave.evidence
    newer = authority().collateral(
        now_ms() - 3_600_000, knobs=CollateralKnobs(evaluation_number=101)
    )
    enclave.evidence = fresh.model_copy(update={"collateral": newer})
    ask(network, state_dir=tmp_path)
    enclave.evidence = fresh
    network.seen.clear()
    refused(network, "tcb_eval_number", state_dir=tmp_path)


def test_a_damaged_state_file_stops_the_client(network: TestNetwork, tmp_path: Path) -> None:
    (tmp_path / "trust-state.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"trust-state\.json"):
        ask(network, state_dir=tmp_path)


def test_evidence_is_verified_once_while_it_holds(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    monkeypatch.setattr("cocoon.client.trust.verify_provider", counting)
    chosen = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    with openai_client(chosen, max_retries=0) as client:
        client.chat.completions.create(**ASK)
        network.enclaves[0].rotate()  # a reseal reads the directory again
        client.chat.completions.create(**ASK)
    assert network.directory_reads == 2
    assert counting.count == 1


def test_a_price_over_the_callers_limit_is_not_sealed(network: TestNetwork) -> None:
    chosen = NetworkOptions(
        gateway_url=network.url, trust=trust(), api_key=KEY, max_price_nanoton=10
    )
    with (
        openai_client(chosen, max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(**ASK)
    assert caught.value.code == "price_limit"
    assert network.seen == []


def test_a_listing_without_a_usable_provider_is_asked_for_again(
    network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "EMPTY_S", 0.0)
    listed, network.enclaves = network.enclaves, []
    chosen = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    with openai_client(chosen, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(**ASK)
        assert refused.value.code == "no_provider"

        network.enclaves = listed
        answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
