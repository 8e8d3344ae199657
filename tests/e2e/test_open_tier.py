"""A network with a provider without a TEE: only who asks for it gets it, and is told."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.client import NetworkOptions, choice, openai_client
from cocoon.devnet.folder import DataFolder
from cocoon.devnet.identity import make_identity, open_names, provider_names
from cocoon.evidence.policy import OpenTierRules, parse_policy, sign
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import SystemClock
from cocoon.sealing.receipt import verify_receipt
from tests.support.asking import ENDLESS, attested_key, get, sql, wait_ended
from tests.support.network import LiveNetwork

SHORT: dict[str, Any] = {
    "model": "skills-1", "messages": [{"role": "user", "content": "Reverse: cocoon"}],
    "max_tokens": 64,
}  # fmt: skip
LONG: dict[str, Any] = {**ENDLESS, "max_tokens": 200}
DEAR: dict[str, Any] = {**SHORT, "max_tokens": 400}  # 32,000 nanoTON at the least
OPEN: dict[str, Any] = {"tiers": ["open"]}
BOTH: dict[str, Any] = {"tiers": ["open", "simulated"]}
RULES = OpenTierRules(
    allowed=True, max_running_jobs=2, max_job_nanoton=25_000, max_providers=1
)  # fmt: skip


def prepared(data: Path) -> None:
    """A network's folder whose policy has narrow limits."""
    folder = DataFolder(data)
    folder.prepare()
    make_identity(folder, (0, 1), SystemClock(), provider_names(1), open_names(1))
    policy = parse_policy(folder.policy.read_bytes()).policy
    signer = (folder.secrets / "policy_signer").read_bytes()
    signed = sign(policy.model_copy(update={"open_tier": RULES}), [signer])
    folder.policy.write_bytes(signed.to_canonical())


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        prepared(folder / "data")
        with LiveNetwork(folder / "data", ("--open", "1")) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def tiers(network: LiveNetwork) -> dict[str, str]:
    """Tier -> the provider's id."""
    listed = get(network, "/v1/directory?model=skills-1").json()["providers"]
    return {entry["tier"]: entry["provider_id"] for entry in listed}


def asked(
    network: LiveNetwork, wishes: dict[str, Any] | None = None,
    body: dict[str, Any] | None = None, **more: Any,
) -> Any:  # fmt: skip
    with openai.OpenAI(base_url=network.sidecar, api_key=network.api_key, max_retries=0) as client:
        return client.chat.completions.with_raw_response.create(
            **(body or SHORT), extra_body={"provider": wishes} if wishes else None, **more
        )


def test_the_default_never_goes_there(network: LiveNetwork, tiers: dict[str, str]) -> None:
    assert set(tiers) == {"open", "simulated"}
    for _ in range(8):
        answer = asked(network)
        assert answer.headers["x-cocoon-provider"] == tiers["simulated"]
        assert answer.headers["x-cocoon-tier"] == "simulated"
    for wishes in ({"only": [tiers["open"]]}, {"ignore": [tiers["simulated"]]}):
        with pytest.raises(openai.BadRequestError) as refused:
            asked(network, wishes)
        assert refused.value.code == "no_provider"


def test_who_asks_for_it_gets_it_with_its_label_and_a_receipt_of_open_evidence(
    network: LiveNetwork, tiers: dict[str, str]
) -> None:
    answer = asked(network, OPEN)
    body = answer.parse()
    assert body.choices[0].message.content == "noococ"
    assert answer.headers["x-cocoon-provider"] == tiers["open"]
    assert answer.headers["x-cocoon-tier"] == "open"
    facts = body.usage.model_dump()["cocoon"]
    assert (facts["assurance"], facts["provider_id"]) == ("open", tiers["open"])
    key, evidence_id = attested_key(network, tiers["open"])
    assert verify_receipt(bytes.fromhex(facts["receipt"]), key).evidence_id == evidence_id
    ended = wait_ended(network, answer.headers["x-cocoon-job-id"])
    assert (ended["status"], ended["price_nanoton"]) == ("settled", facts["cost_nanoton"])


def test_a_header_or_the_client_s_options_ask_for_it_too(network: LiveNetwork) -> None:
    answer = asked(network, extra_headers={"x-cocoon-tiers": "open"})
    assert answer.headers["x-cocoon-tier"] == "open"
    options = NetworkOptions(
        network.gateway,
        network.folder.trust,
        api_key=network.api_key,
        assurances=[Assurance.OPEN],
    )
    with openai_client(options, max_retries=0) as client:
        told = client.chat.completions.with_raw_response.create(**SHORT)
    assert told.headers["x-cocoon-tier"] == "open"


def test_who_takes_both_gets_the_protected_one(network: LiveNetwork) -> None:
    assert {asked(network, BOTH).headers["x-cocoon-tier"] for _ in range(5)} == {"simulated"}


def test_it_runs_no_more_jobs_at_once_than_the_policy_says(
    network: LiveNetwork, tiers: dict[str, str]
) -> None:
    most = RULES.max_running_jobs
    with ThreadPoolExecutor(3 * most) as pool:
        told = list(pool.map(lambda _: asked(network, OPEN, LONG), range(3 * most)))
    assert {one.headers["x-cocoon-tier"] for one in told} == {"open"}
    wait_ended(network, told[-1].headers["x-cocoon-job-id"])
    rows = sql(
        network,
        "SELECT type FROM log.events WHERE shard = 1"  # noqa: S608 - an id of our own
        " AND type IN ('ProviderMatched', 'ResultSealed', 'LeaseExpired')"
        f" AND data::jsonb->>'provider_id' = '{tiers['open']}' ORDER BY position",
    )
    running = list(accumulate(1 if kind == "ProviderMatched" else -1 for (kind,) in rows))
    assert max(running) == most
    assert running[-1] == 0


def test_a_job_over_the_policy_s_limit_is_refused_by_the_client_and_by_the_matcher(
    network: LiveNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        asked(network, OPEN, DEAR)
    assert refused.value.code == "open_tier_limit"
    assert asked(network, BOTH, DEAR).headers["x-cocoon-tier"] == "simulated"
    monkeypatch.setattr(
        choice, "_within_open_limit", lambda priced, _: priced
    )  # a client that lies
    options = NetworkOptions(network.gateway, network.folder.trust, api_key=network.api_key)
    with openai_client(options, max_retries=0) as client, pytest.raises(openai.APIError) as late:
        client.chat.completions.create(**DEAR, extra_body={"provider": OPEN})
    assert late.value.code == "no_provider_open_limits"


def test_everybody_is_told_what_it_is(network: LiveNetwork, tiers: dict[str, str]) -> None:
    (model,) = get(network, "/v1/models").json()["data"]
    assert model["cocoon"]["tier"] == "open,simulated"
    shown = json.loads(network.cli("status", "--json").stdout)["providers"]
    assert {one["provider_id"]: one["tier"] for one in shown} == {
        provider: tier for tier, provider in tiers.items()
    }
    printed = network.cli("status").stdout.splitlines()
    (line,) = [one for one in printed if tiers["open"] in one]
    assert "open" in line.replace(",", " ").split()


def test_the_log_replays_and_decides_the_same_again(network: LiveNetwork) -> None:
    assert network.cli("replay", "--verify", "--decisions").returncode == 0
