"""Retries, repeats and callers that leave: never a second paid job, always the same bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from cocoon.client import NetworkOptions, Sidecar, async_transport, openai_client, repeats
from tests.support.client_world import KEY, TEXT, Faults, TestNetwork, served, trust

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}
BUSY = {"error": {"message": "Busy.", "type": "t", "param": None, "code": "busy"}}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world
        world.gate.set()


@pytest.fixture
def sidecar(network: TestNetwork) -> Iterator[str]:
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    with served(Sidecar(options), lifespan="on") as url:
        yield f"{url}/v1/chat/completions"


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=20) as client:
        yield client


def retrying(network: TestNetwork, **more: Any) -> openai.OpenAI:
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    return openai_client(options, **more)


def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def leave(url: str, ask: dict[str, Any], condition: Any, headers: dict[str, str]) -> None:
    """Send a request and close the connection once the condition holds."""
    parts = urlsplit(url)
    body = httpx.Request("POST", url, json=ask).content  # the bytes that a retry sends
    lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        until(condition)


def test_the_sdks_retry_of_a_busy_network_sends_the_same_envelope(network: TestNetwork) -> None:
    network.faults.refuse = [(503, BUSY, {"retry-after": "1"}), (429, BUSY, {"retry-after": "1"})]
    with retrying(network, max_retries=2) as client:
        answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
    assert len(network.seen) == 3
    assert len(set(network.seen)) == 1
    assert network.paid == 1


def test_the_sdks_retry_after_its_own_timeout_gets_the_running_job(network: TestNetwork) -> None:
    network.faults.slow_first = True
    with retrying(network, max_retries=2, timeout=2.0) as client:
        opening = threading.Timer(2.3, network.gate.set)
        opening.start()
        answer = client.chat.completions.create(**ASK)
        opening.join()
    assert answer.choices[0].message.content == TEXT
    assert network.paid == 1
    assert len(network.seen) == 1


def test_a_retry_over_the_sidecar_gets_the_running_job_and_the_same_bytes(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    network.faults.slow_after = 4
    ask = {**ASK, "stream": True}
    first = b""
    with http.stream(
        "POST", sidecar, json=ask, headers={"x-stainless-retry-count": "0"}
    ) as response:
        for part in response.iter_raw():
            first += part
            if first.count(b"\n\n") >= 3:
                break
    network.gate.set()
    second = http.post(sidecar, json=ask, headers={"x-stainless-retry-count": "1"}).content
    assert second.startswith(first)
    assert second.endswith(b"data: [DONE]\n\n")
    assert network.paid == 1


def test_a_repeated_idempotency_key_gets_the_same_bytes(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    for stream in (False, True):
        headers = {"idempotency-key": f"order-{stream}"}
        ask = {**ASK, "stream": stream}
        answers = [http.post(sidecar, json=ask, headers=headers) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers["x-cocoon-job-id"] for answer in answers}) == 1
    assert network.paid == 2
    assert "order-False" not in network.keys  # the gateway sees a hash


def test_repeats_at_the_same_time_share_one_job(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    network.faults.slow_first = True

    def ask(_: int) -> bytes:
        return http.post(sidecar, json=ASK, headers={"idempotency-key": "k"}).content

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, index) for index in range(4)]
        until(lambda: network.seen)
        network.gate.set()
        answers = {future.result() for future in waiting}
    assert len(answers) == 1
    assert network.paid == 1


def test_another_body_under_the_same_key_is_a_conflict_that_is_not_retried(
    sidecar: str, network: TestNetwork, http: httpx.Client
) -> None:
    headers = {"idempotency-key": "k"}
    http.post(sidecar, json=ASK, headers=headers)
    answer = http.post(sidecar, json={**ASK, "seed": 1}, headers=headers)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "idempotency_mismatch"
    assert answer.headers["x-should-retry"] == "false"
    assert network.paid == 1


def test_a_key_belongs_to_its_caller(network: TestNetwork, http: httpx.Client) -> None:
    options = NetworkOptions(gateway_url=network.url, trust=trust())
    with served(Sidecar(options), lifespan="on") as base:
        url = f"{base}/v1/chat/completions"
        mine = {"idempotency-key": "k", "authorization": f"Bearer {KEY}"}
        theirs = {"idempotency-key": "k", "authorization": "Bearer ck_other"}
        assert http.post(url, json=ASK, headers=mine).status_code == 200
        assert http.post(url, json=ASK, headers=theirs).status_code == 401


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "kä"])
def test_a_key_that_is_not_visible_ascii_is_refused(
    sidecar: str, http: httpx.Client, network: TestNetwork, key: str
) -> None:
    answer = http.post(sidecar, json=ASK, headers=[(b"idempotency-key", key.encode("latin-1"))])  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_idempotency_key"
    assert network.seen == []


def test_two_equal_requests_without_a_key_are_two_jobs(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    for _ in range(2):
        assert http.post(sidecar, json=ASK, headers={"x-stainless-retry-count": "0"}).is_success
    assert network.paid == 2


def test_two_equal_retries_are_two_jobs_when_two_requests_were_made(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    network.faults.slow_first = True
    for count in (1, 2):
        leave(
            sidecar,
            ASK,
            lambda count=count: network.paid == count,
            {"x-stainless-retry-count": "0"},
        )
    network.gate.set()
    jobs = {
        http.post(sidecar, json=ASK, headers={"x-stainless-retry-count": "1"}).headers[
            "x-cocoon-job-id"
        ]
        for _ in range(2)
    }
    assert len(jobs) == 2
    assert network.paid == 2


def test_a_caller_that_cannot_retry_cancels_its_job_by_leaving(
    network: TestNetwork, sidecar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "GRACE_S", 3600)
    network.faults.slow_first = True
    leave(sidecar, ASK, lambda: network.paid, {})
    assert network.cancelled.wait(10)
    until(lambda: network.deleted == list(network.jobs))  # said, not left to the line's end


def test_a_caller_that_may_retry_gets_a_grace_and_then_a_clear_conflict(
    network: TestNetwork, sidecar: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "GRACE_S", 0.5)
    network.faults.slow_first = True
    leave(sidecar, ASK, lambda: network.paid, {"x-stainless-retry-count": "0"})
    assert network.cancelled.wait(10)
    answer = http.post(sidecar, json=ASK, headers={"x-stainless-retry-count": "1"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "cancelled"
    assert answer.headers["x-should-retry"] == "false"
    assert network.paid == 1


def test_a_stream_that_its_reader_closes_is_cancelled(network: TestNetwork) -> None:
    network.faults.slow_after = 4
    with retrying(network, max_retries=0) as client:
        stream = client.chat.completions.create(
            **ASK, stream=True, extra_headers={"x-stainless-retry-count": openai.omit}
        )
        next(iter(stream))
        stream.close()
        assert network.cancelled.wait(2)


def test_closing_the_client_cancels_what_runs(network: TestNetwork) -> None:
    network.faults.slow_after = 4
    client = retrying(network, max_retries=0)
    stream = client.chat.completions.create(**ASK, stream=True)
    next(iter(stream))
    client.close()
    assert network.cancelled.wait(2)
    assert network.deleted == list(network.jobs)


def test_closing_the_client_leaves_a_job_that_has_a_key_to_whoever_comes_back(
    network: TestNetwork,
) -> None:
    network.faults.slow_after = 4
    client = retrying(network, max_retries=0)
    stream = client.chat.completions.create(
        **ASK, stream=True, extra_headers={"idempotency-key": "k"}
    )
    next(iter(stream))
    client.close()
    assert network.cancelled.wait(2)  # its line is closed
    assert network.deleted == []


async def test_a_stream_that_the_client_closes_under_its_reader_ends_with_an_error(
    network: TestNetwork,
) -> None:
    """A stock client takes a stream that just ends for a whole answer."""
    network.faults.slow_after = 4
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    sealed = async_transport(options)
    async with (
        httpx.AsyncClient(transport=sealed) as http,
        openai.AsyncOpenAI(base_url="http://sealed/v1", api_key=KEY, http_client=http) as client,
    ):
        stream = await client.chat.completions.create(**ASK, stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        await sealed.aclose()
        with pytest.raises(openai.APIError) as caught:
            async for _ in chunks:
                pass
        assert caught.value.code == "client_closed"


def test_an_error_in_a_stream_is_replayed_as_it_was(
    network: TestNetwork, sidecar: str, http: httpx.Client
) -> None:
    network.faults = Faults(forged_receipt=True, slow_after=4)
    headers = {"idempotency-key": "k"}
    ask = {**ASK, "stream": True}
    first = b""
    with http.stream("POST", sidecar, json=ask, headers=headers) as response:
        for part in response.iter_raw():
            first += part
            network.gate.set()  # what came before the forged receipt was shown
    bodies = [first, http.post(sidecar, json=ask, headers=headers).content]
    assert bodies[0] == bodies[1]
    last = bodies[0].split(b"\n\n")[-2].removeprefix(b"data: ")
    assert json.loads(last)["error"]["code"] == "receipt_sig"
    assert b"[DONE]" not in bodies[0]
    assert network.paid == 1
