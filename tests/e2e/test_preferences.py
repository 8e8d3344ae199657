"""What a client asks of its provider holds, and everybody can see afterwards who got the job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.asking import get
from tests.support.extra_processes import connected
from tests.support.network import LiveNetwork

MESSAGES: Any = [{"role": "user", "content": "Reverse: cocoon"}]


@pytest.fixture(scope="module")
def two() -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    try:
        with LiveNetwork(folder / "data", ("--providers", "2")) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def providers(two: LiveNetwork) -> tuple[str, str]:
    listed = get(two, "/v1/directory?model=skills-1").json()["providers"]
    first, second = sorted(entry["provider_id"] for entry in listed)
    return first, second


def asked(network: LiveNetwork, **wishes: Any) -> tuple[str, str]:
    """The provider that answered, and the job."""
    client = openai.OpenAI(base_url=network.sidecar, api_key="any", max_retries=0)
    answer = client.chat.completions.with_raw_response.create(
        model="skills-1", messages=MESSAGES, extra_body={"provider": wishes}
    )
    assert answer.parse().choices[0].message.content
    return answer.headers["x-cocoon-provider"], answer.headers["x-cocoon-job-id"]


@pytest.mark.parametrize("turn", [0, 1])
def test_the_provider_that_is_asked_for_answers(
    two: LiveNetwork, providers: tuple[str, str], turn: int
) -> None:
    wanted, other = providers[turn], providers[1 - turn]
    for wishes in ({"only": [wanted]}, {"ignore": [other]}, {"order": [wanted, other]}):
        assert asked(two, **wishes)[0] == wanted


@pytest.mark.parametrize(
    ("wishes", "param", "code"),
    [
        ({"only": ["prov_nobody"]}, "provider.only", "no_provider"),
        ({"tiers": ["attested"]}, "provider.tiers", "no_provider"),
        ({"max_output_nanoton_per_mtok": "1"}, "provider.max_output_nanoton_per_mtok",
         "no_provider"),
        ({"sort": "fame"}, "provider.sort", "invalid_value"),
        ({"favourite": "x"}, "provider.favourite", "invalid_value"),
    ],
)  # fmt: skip
def test_a_wish_that_nobody_meets_or_that_is_none_is_refused_by_its_name(
    two: LiveNetwork, wishes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        asked(two, **wishes)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_a_region_and_a_quantisation_that_are_told_can_be_asked_for(
    two: LiveNetwork, providers: tuple[str, str]
) -> None:
    listed = get(two, "/v1/directory?model=skills-1").json()["providers"]
    regions = {entry["provider_id"]: entry["region"] for entry in listed}
    assert sorted(regions.values()) == ["dev-1", "dev-2"]
    (quantisation,) = {entry["quantisation"] for entry in listed}
    for wanted in providers:
        wishes = {"regions": [regions[wanted]], "quantisations": [quantisation]}
        assert asked(two, **wishes)[0] == wanted
    told = two.cli("status").stdout
    assert f"simulated, {quantisation}, dev-1" in told


def test_what_requests_without_wishes_ask_for_is_set_where_they_are_sealed(
    two: LiveNetwork, providers: tuple[str, str]
) -> None:
    wishes = json.dumps({"only": [providers[1]]})
    with connected(two, "--key", two.api_key, "--provider", wishes) as sidecar:
        client = openai.OpenAI(base_url=sidecar.base_url, api_key="any", max_retries=0)
        for own, expected in ((None, providers[1]), ({"only": [providers[0]]}, providers[0])):
            answer = client.chat.completions.with_raw_response.create(
                model="skills-1", messages=MESSAGES,
                extra_body={} if own is None else {"provider": own},
            )  # fmt: skip
            assert answer.headers["x-cocoon-provider"] == expected
    for wrong in ("no json", '{"sort": "fame"}'):
        refused = subprocess.run(
            [sys.executable, "-m", "cocoon.cli", "connect", "--gateway", two.gateway, "--trust",
             str(two.folder.trust), "--provider", wrong],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert refused.returncode != 0
        assert "--provider" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(("tier", "told"), [("flex", "flex"), ("priority", "priority"),
                                            ("auto", "default")])  # fmt: skip
def test_a_service_tier_is_taken_and_told(two: LiveNetwork, tier: Any, told: str) -> None:
    client = openai.OpenAI(base_url=two.sidecar, api_key="any", max_retries=0)
    answer = client.chat.completions.create(model="skills-1", messages=MESSAGES, service_tier=tier)
    assert answer.service_tier == told
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="skills-1", messages=MESSAGES, service_tier="scale")
    assert refused.value.param == "service_tier"


def test_a_wish_holds_over_a_restart_of_the_matcher(
    two: LiveNetwork, providers: tuple[str, str]
) -> None:
    before = two.pid("matcher")
    two.kill("matcher")
    two.wait_restarted("matcher", before)
    wanted, _ = providers
    assert asked(two, only=[wanted])[0] == wanted
    replayed = two.cli("replay", "--verify", "--decisions")
    assert replayed.returncode == 0, replayed.stdout
    assert "seeds of a secret that is not revealed yet" in replayed.stdout


def test_everybody_is_told_the_same_of_a_decision(
    two: LiveNetwork, providers: tuple[str, str]
) -> None:
    wanted, other = providers
    _, job = asked(two, order=[wanted])
    told = get(two, f"/v1/jobs/{job}/explanation").json()
    assert json.loads(two.cli("explain", job, "--json").stdout) == told
    (decision,) = told["decisions"]
    outcomes = {one["provider_id"]: (one["outcome"], one["by"]) for one in decision["providers"]}
    assert outcomes == {wanted: ("won", "order"), other: ("lost", "order")}
    printed = two.cli("explain", job).stdout
    assert f"{wanted}  simulated  it got the job, by the client's order" in printed
    assert f"{other}  simulated  it lost on the client's order" in printed
    assert two.cli("replay", "--verify", "--decisions").returncode == 0


def test_a_stranger_s_job_is_explained_to_nobody(two: LiveNetwork) -> None:
    assert get(two, "/v1/jobs/" + "0" * 32 + "/explanation").status_code == 404
    unknown = two.cli("explain", "0" * 32)
    assert (unknown.returncode, "has a job" in unknown.stderr) == (1, True)
    assert two.cli("explain", "no job").returncode == 64


def test_another_policy_is_tried_on_the_same_log(two: LiveNetwork, tmp_path: Path) -> None:
    asked(two)
    command = [sys.executable, "-m", "cocoon.cli", "matching", "show"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({**shown, "name": "mine", "price_weight": 900}))
    found = json.loads(two.cli("matching", "backtest", "--policy", str(policy), "--json").stdout)
    assert found["decisions"] >= 1
    assert sum(found["then"]["jobs"].values()) == found["decisions"]
    assert "would have gone elsewhere" in two.cli(
        "matching", "backtest", "--policy", str(policy)
    ).stdout  # fmt: skip
    policy.write_text(json.dumps({**shown, "warm": 0}))
    refused = two.cli("matching", "backtest", "--policy", str(policy))
    assert (refused.returncode, "warm" in refused.stderr) == (64, True)
