"""A client that leaves in the middle pays for what was delivered, and the engine stops."""

from __future__ import annotations

import json
import re
import time

import httpx
import openai
import pytest

from cocoon.client import NetworkOptions
from cocoon.sealing import Status, verify_receipt
from tests.support.asking import (
    ENDLESS,
    ask,
    attested_key,
    get,
    jobs_requested,
    quiet_balance,
    wait_ended,
)
from tests.support.network import LiveNetwork
from tests.support.ways import Way, way

LONG = {**ENDLESS, "max_tokens": 600, "stream": True}


def engine_metric(network: LiveNetwork, name: str) -> float:
    text = httpx.get(f"{network.running.observe_urls['provider']}/metrics", trust_env=False).text
    found = re.search(rf"^{re.escape(name)} ([0-9.e+]+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_idle(network: LiveNetwork) -> None:
    deadline = time.monotonic() + 10
    while engine_metric(network, "cocoon_jobs_in_flight"):
        assert time.monotonic() < deadline, "the engine goes on"
        time.sleep(0.02)


def check_cancelled(network: LiveNetwork, job_id: str, before: int, at_least: int = 1) -> None:
    """The job ended as cancelled; exactly its receipt's price was paid, for part of the answer."""
    job = wait_ended(network, job_id)
    assert (job["status"], job["result"]["status"]) == ("settled", "cancelled")
    key, _ = attested_key(network, job["provider_id"])
    receipt = verify_receipt(bytes.fromhex(job["result"]["receipt"]), key)
    assert receipt.status is Status.CANCELLED
    assert at_least <= receipt.output_tokens < 600
    assert str(receipt.price_nanoton) == job["price_nanoton"]
    assert before - quiet_balance(network) == receipt.price_nanoton > 0
    wait_idle(network)
    steps = engine_metric(network, "cocoon_engine_step_seconds_count")
    time.sleep(0.2)
    assert engine_metric(network, "cocoon_engine_step_seconds_count") == steps


def test_a_caller_that_leaves_the_sidecar_cancels_its_job(network: LiveNetwork) -> None:
    before = quiet_balance(network)
    with httpx.stream(
        "POST", f"{network.sidecar}/chat/completions", json=LONG, timeout=20, trust_env=False
    ) as answer:
        lines = answer.iter_lines()
        spoken = [next(lines) for _ in range(9)]
    assert spoken[-1].startswith("data: {")
    check_cancelled(network, answer.headers["x-cocoon-job-id"], before, at_least=9)


@pytest.mark.parametrize("name", ["sync sidecar", "sync in-process"])
def test_a_stock_client_that_will_not_come_back_cancels_its_job(
    network: LiveNetwork, options: NetworkOptions, name: str
) -> None:
    """Without its retry count the SDK promises nothing, so the job ends when its stream closes."""
    before = quiet_balance(network)
    headers = {"X-Stainless-Retry-Count": openai.Omit()}
    with way(name, network.sidecar, options) as client:
        assert isinstance(client.client, openai.OpenAI)
        with client.client.chat.completions.create(**LONG, extra_headers=headers) as stream:
            chunks = [next(stream) for _ in range(6)]
        check_cancelled(network, chunks[0].id.removeprefix("chatcmpl-"), before)


def test_a_stock_client_has_a_moment_to_come_back_for_its_answer(
    network: LiveNetwork, sidecar: Way
) -> None:
    assert isinstance(sidecar.client, openai.OpenAI)
    with sidecar.client.chat.completions.create(**LONG | {"max_tokens": 200}) as stream:
        job_id = next(stream).id.removeprefix("chatcmpl-")
    assert wait_ended(network, job_id)["result"]["status"] == "length"


def test_leaving_before_the_answer_begins_costs_at_most_what_was_made(
    network: LiveNetwork, sidecar: Way
) -> None:
    before, jobs = quiet_balance(network), jobs_requested(network)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{network.sidecar}/chat/completions", json={**LONG, "stream": False}, trust_env=False,
            timeout=httpx.Timeout(10, read=0.15),
        )  # fmt: skip
    deadline = time.monotonic() + 10
    while jobs_requested(network) == jobs:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    paid = before - quiet_balance(network)
    assert 0 <= paid < 45_000
    wait_idle(network)
    assert sidecar.complete(**ask("Reverse: cocoon")).choices[0].message.content == "noococ"


def test_a_job_is_cancelled_by_its_owner_and_by_nobody_else(network: LiveNetwork) -> None:
    before = quiet_balance(network)
    made = network.cli("keys", "create", "--json").stdout
    stranger = re.search(r"ck_[\w-]{43}", made)
    assert stranger is not None
    with httpx.stream(
        "POST", f"{network.sidecar}/chat/completions", json=LONG, timeout=20, trust_env=False
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        job_id = answer.headers["x-cocoon-job-id"]
        url = f"{network.gateway}/v1/jobs/{job_id}"
        for key, status in ((stranger[0], 404), ("ck_none", 401), (network.api_key, 202)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.delete(url, headers=headers, trust_env=False).status_code == status
        *_, last, _ = lines
    assert "[DONE]" not in last
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert get(network, f"/v1/jobs/{job_id}", stranger[0]).status_code == 404
    check_cancelled(network, job_id, before)
