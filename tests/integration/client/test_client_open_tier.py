"""The open tier through the stock OpenAI client: never by itself, and never under another name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.client import NetworkOptions, Sidecar, openai_client
from cocoon.client.choice import HOW_TO_ASK
from cocoon.client.serve import OPEN_WARNING
from cocoon.devnet.authority import dev_policy
from cocoon.evidence.policy import sign
from cocoon.evidence.trust import trust_document
from cocoon.evidence.verdict import Assurance
from cocoon.sealing import key_id, parse_header
from tests.support.client_world import (
    KEY,
    NETWORK,
    OPEN_TIER,
    POLICY_SIGNER,
    TEXT,
    Enclave,
    TestNetwork,
    authority,
    served,
    trust,
)

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}
OPEN: dict[str, Any] = {"provider": {"tiers": ["open"]}}
BOTH: dict[str, Any] = {"provider": {"tiers": ["open", "simulated"]}}


@contextmanager
def serving(*enclaves: Enclave) -> Iterator[TestNetwork]:
    world = TestNetwork(*enclaves)
    with served(world) as url:
        world.url = url
        yield world


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    """One provider, without a TEE."""
    with serving(Enclave(is_open=True)) as world:
        yield world


@pytest.fixture
def mixed() -> Iterator[TestNetwork]:
    """A simulated provider, then one without a TEE."""
    with serving(Enclave(), Enclave(is_open=True)) as world:
        yield world


def options(network: TestNetwork, **more: Any) -> NetworkOptions:
    return NetworkOptions(**{"gateway_url": network.url, "trust": trust(), "api_key": KEY, **more})


def ask(network: TestNetwork, body: dict[str, Any] | None = None, **more: Any) -> Any:
    headers = more.pop("headers", None)
    with openai_client(options(network, **more), max_retries=0) as client:
        return client.chat.completions.with_raw_response.create(
            **ASK, extra_body=body, extra_headers=headers
        )


def sealed_to(network: TestNetwork, index: int = -1) -> set[int]:
    """The numbers of the enclaves that a request was sealed to."""
    header, _ = parse_header(network.seen[index])
    ids = [key_id(enclave.x25519_pk) for enclave in network.enclaves]
    return {ids.index(one) for one in header.key_ids}


def refused(
    network: TestNetwork, code: str, body: dict[str, Any] | None = None, **more: Any
) -> str:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(network, body, **more)
    assert caught.value.code == code
    assert network.seen == []  # nothing was sealed, nothing was sent
    return caught.value.message


def test_a_client_that_asks_for_nothing_never_gets_it(network: TestNetwork) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(network)
    assert isinstance(caught.value.body, dict)
    assert HOW_TO_ASK in caught.value.body["message"]
    refused(network, "assurance", {"provider": {"sort": "price"}})
    refused(network, "assurance", {"provider": {"only": [network.enclaves[0].provider_id]}})
    refused(network, "assurance", {"provider": {"tiers": ["attested", "simulated"]}})


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("the request's body", {"body": OPEN}),
    ("a header", {"headers": {"x-cocoon-tiers": "attested, open"}}),
    ("the client's options", {"assurances": [Assurance.OPEN]}),
    ("the client's options among others", {"assurances": [Assurance.SIMULATED, Assurance.OPEN]}),
]  # fmt: skip


@pytest.mark.parametrize("way", [row[1] for row in WAYS], ids=[row[0] for row in WAYS])
def test_who_asks_for_it_gets_it_and_is_told(network: TestNetwork, way: dict[str, Any]) -> None:
    raw = ask(network, **way)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert raw.headers["x-cocoon-tier"] == "open"
    assert answer.usage.model_dump()["cocoon"]["assurance"] == "open"
    assert sealed_to(network) == {0}


def test_a_stream_is_labelled_before_its_first_word(network: TestNetwork) -> None:
    with openai_client(options(network), max_retries=0) as client:
        create = client.chat.completions.with_streaming_response.create
        with create(**ASK, stream=True, extra_body=OPEN) as raw:
            assert raw.headers["x-cocoon-tier"] == "open"
            raw.read()


def test_the_sidecar_takes_the_same_header(network: TestNetwork) -> None:
    with (
        served(Sidecar(options(network)), lifespan="on") as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key=KEY, max_retries=0,
            default_headers={"x-cocoon-tiers": "open"},
        ) as client,
    ):  # fmt: skip
        raw = client.chat.completions.with_raw_response.create(**ASK)
        assert raw.headers["x-cocoon-tier"] == "open"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASK, extra_headers={"x-cocoon-tiers": "free"})
    assert (caught.value.param, caught.value.code) == ("x-cocoon-tiers", "invalid_value")


def test_what_the_owner_names_is_all_that_a_request_can_get(network: TestNetwork) -> None:
    only = [Assurance.ATTESTED, Assurance.SIMULATED]
    refused(network, "assurance", OPEN, assurances=only)
    refused(network, "assurance", assurances=only, headers={"x-cocoon-tiers": "open"})


@pytest.mark.parametrize("tier", ["simulated", "attested", "facility"])
def test_a_gateway_that_calls_it_better_makes_nobody_seal_to_it(
    network: TestNetwork, tier: str
) -> None:
    (enclave,) = network.enclaves
    enclave.tier = tier
    for body in (None, OPEN, {"provider": {"tiers": [tier]}}):
        message = refused(network, "tier_lifted", body)
    assert f"calls it {tier}; its evidence shows open" in message
    assert enclave.provider_id in message


def test_nor_does_one_that_calls_its_evidence_a_quote(network: TestNetwork) -> None:
    (enclave,) = network.enclaves
    enclave.tier = "simulated"
    enclave.evidence = enclave.evidence.model_copy(
        update={"tee": "tdx", "collateral": Enclave().evidence.collateral}
    )
    for body in (None, OPEN):
        refused(network, "malformed", body)


def test_nor_one_that_shows_another_s_evidence_for_it(mixed: TestNetwork) -> None:
    protected, unprotected = mixed.enclaves
    unprotected.tier, unprotected.evidence = "simulated", protected.evidence
    ask(mixed)
    assert sealed_to(mixed) == {0}


def test_a_label_that_is_worse_than_the_evidence_or_missing_changes_nothing(
    mixed: TestNetwork,
) -> None:
    mixed.enclaves[0].tier = "open"
    ask(mixed)
    assert sealed_to(mixed) == {0}
    mixed.enclaves[1].tier = "platinum"
    ask(mixed)
    assert sealed_to(mixed) == {0}


def test_a_policy_without_the_tier_refuses_it_whatever_is_asked(network: TestNetwork) -> None:
    network.signed = sign(dev_policy(authority(), NETWORK), [bytes(POLICY_SIGNER)])
    refused(network, "open_tier", OPEN)


def test_who_takes_both_gets_the_protected_one_first(mixed: TestNetwork) -> None:
    for _ in range(5):
        assert ask(mixed, BOTH).headers["x-cocoon-tier"] == "simulated"
        assert sealed_to(mixed) == {0}


def test_and_the_open_one_where_no_other_has_a_place(mixed: TestNetwork) -> None:
    mixed.enclaves[0].running = 8
    ask(mixed, BOTH)
    assert sealed_to(mixed) == {0, 1}
    ask(mixed)
    assert sealed_to(mixed) == {0}


def test_or_where_the_caller_ranks_them_itself(mixed: TestNetwork) -> None:
    named = {"tiers": ["open", "simulated"], "order": [mixed.enclaves[1].provider_id]}
    ask(mixed, {"provider": named})
    assert sealed_to(mixed) == {0, 1}
    ask(mixed, {"provider": {"tiers": ["open", "simulated"], "sort": "price"}})
    assert sealed_to(mixed) == {0, 1}
    ask(mixed, {"provider": {"order": [mixed.enclaves[1].provider_id]}})  # a name is no tier
    assert sealed_to(mixed) == {0}


def test_a_job_over_the_policy_s_limit_is_not_sealed_to_it(network: TestNetwork) -> None:
    narrow = OPEN_TIER.model_copy(update={"max_job_nanoton": 1})
    policy = dev_policy(authority(), NETWORK, open_tier=narrow)
    network.signed = sign(policy, [bytes(POLICY_SIGNER)])
    message = refused(network, "open_tier_limit", OPEN)
    assert "over the 1 that this network's policy allows" in message


def test_a_crowd_of_open_names_does_not_push_the_others_out(
    mixed: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoon.client.directory.MAX_PROVIDERS", 1)
    mixed.enclaves.reverse()
    assert ask(mixed).headers["x-cocoon-tier"] == "simulated"


def test_a_repeat_is_not_sent_to_a_tier_that_its_owner_took_away(
    network: TestNetwork, tmp_path: Path
) -> None:
    key = {"Idempotency-Key": "once"}
    ask(network, assurances=[Assurance.OPEN], state_dir=tmp_path, headers=key)
    network.seen.clear()
    refused(network, "assurance", state_dir=tmp_path, headers=key)


def test_the_log_says_once_that_it_was_used(
    network: TestNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    with openai_client(options(network), max_retries=0) as client:
        for _ in range(2):
            client.chat.completions.create(**ASK, extra_body=OPEN)
    assert [one.message for one in caplog.records if one.name == "cocoon.client"] == [
        "open_tier_used"
    ]


@pytest.mark.parametrize(("tiers", "warned"), [("simulated,open", True), ("simulated", False)])
def test_the_sidecar_warns_once_when_it_is_on(
    network: TestNetwork, tmp_path: Path, tiers: str, warned: bool
) -> None:
    (tmp_path / "trust.json").write_bytes(trust_document(trust()))
    command = [
        sys.executable, "-m", "cocoon.cli", "connect", "--port", "0", "--gateway", network.url,
        "--trust", str(tmp_path / "trust.json"), "--key", KEY, "--tiers", tiers,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline().strip()
        finally:
            process.kill()
    assert (first == OPEN_WARNING) is warned


def test_a_word_that_is_no_tier_is_a_sentence(network: TestNetwork, tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_bytes(trust_document(trust()))
    done = subprocess.run(
        [
            sys.executable, "-m", "cocoon.cli", "connect", "--gateway", network.url, "--trust",
            str(tmp_path / "trust.json"), "--tiers", "opne",
        ],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--tiers cannot be this" in done.stderr
