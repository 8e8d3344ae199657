"""Every refusal reaches the stock client as the right exception, with a sentence that helps."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from cocoon.client import NetworkOptions
from tests.support.asking import ENDLESS, MODEL, ask, get, jobs_requested, quiet_balance
from tests.support.extra_processes import Connected, Gateway, connected
from tests.support.network import LiveNetwork
from tests.support.ways import Way, way

UNKNOWN_KEY = "ck_" + "A" * 43


def refused(sdk_class: type[openai.APIStatusError], client: Way, **request: Any) -> dict[str, Any]:
    """The error's facts, after checking that it is an OpenAI error object of exactly this class."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.complete(**request)
    return told(sdk_class, caught.value)


def told(sdk_class: type[openai.APIStatusError], error: openai.APIStatusError) -> dict[str, Any]:
    assert type(error) is sdk_class
    body = error.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert (error.code, error.param, error.type) == (body["code"], body["param"], body["type"])
    return {"status": error.status_code, **body}


def test_an_unknown_model_is_404_and_names_what_there_is(client: Way) -> None:
    error = refused(openai.NotFoundError, client, **{**ask("Hello"), "model": "gpt-9"})
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
    assert MODEL in str(error["message"])
    with pytest.raises(openai.NotFoundError):
        client.model("gpt-9")


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
         "unsupported_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"extra_body": {"wombat": 1}}, "wombat", "unknown_parameter"),
        ({"messages": []}, "messages", None),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_400_by_name_and_costs_nothing(
    network: LiveNetwork, client: Way, parameters: dict[str, Any], param: str, code: str | None
) -> None:
    before = jobs_requested(network)
    error = refused(openai.BadRequestError, client, **{**ask("Hello"), **parameters})
    assert (error["status"], error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code
    assert jobs_requested(network) == before


def test_a_prompt_longer_than_the_context_is_refused_free_of_charge(
    network: LiveNetwork, client: Way
) -> None:
    before = quiet_balance(network)
    error = refused(openai.BadRequestError, client, **ask("word " * 400))
    assert (error["status"], error["code"]) == (400, "context_length_exceeded")
    assert quiet_balance(network) == before


def test_a_body_that_is_not_json_is_400(network: LiveNetwork) -> None:
    for body in (b"{", b"[]", b"\xff", b""):
        answer = httpx.post(
            f"{network.sidecar}/chat/completions", content=body, trust_env=False,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_413(client: Way) -> None:
    error = refused(openai.APIStatusError, client, **ask("a" * (4 * 1024 * 1024)))
    assert error["status"] == 413


def test_a_sealed_body_that_is_too_large_is_413_before_it_is_sent(network: LiveNetwork) -> None:
    place = httpx.URL(network.gateway)
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nhost: {place.host}\r\nauthorization: Bearer "
        f"{network.api_key}\r\ncontent-type: application/vnd.cocoon.cai1\r\n"
        f"content-length: {9 * 1024 * 1024}\r\n\r\n"
    )
    with socket.create_connection((place.host, place.port or 80), timeout=10) as line:
        line.sendall(head.encode() + b"CAI1")
        assert line.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_plaintext_at_the_gateway_is_refused_unread_with_the_way_out(network: LiveNetwork) -> None:
    with (
        openai.OpenAI(
            base_url=f"{network.gateway}/v1", api_key=network.api_key, max_retries=0
        ) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(**ask("Hello"))
    assert caught.value.code == "plaintext_refused"
    assert f"cocoon connect --gateway {network.gateway}" in str(caught.value.body)
    for path in ("responses", "embeddings", "completions"):
        answer = httpx.post(f"{network.gateway}/v1/{path}", json={"input": "x"}, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "plaintext_refused")


def test_a_bad_key_is_401_at_the_gateway_and_through_every_client(
    network: LiveNetwork, keyless: Connected
) -> None:
    for key in (UNKNOWN_KEY, "sk-not-ours"):
        answer = get(network, "/v1/models", api_key=key)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (
            401, 'Bearer realm="cocoon"',
        )  # fmt: skip
        with openai.OpenAI(base_url=keyless.base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.chat.completions.create(**ask("Hello"))
            assert told(openai.AuthenticationError, caught.value)["status"] == 401
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        wrong = NetworkOptions(network.gateway, network.folder.trust, api_key=key)
        for name in ("sync in-process", "async in-process"):
            with way(name, network.sidecar, wrong) as inside:
                refused(openai.AuthenticationError, inside, **ask("Hello"))


def test_an_account_without_funds_is_402_until_it_is_funded(
    network: LiveNetwork, keyless: Connected
) -> None:
    made = json.loads(network.cli("keys", "create", "--name", "poor", "--json").stdout)
    poor = NetworkOptions(network.gateway, network.folder.trust, api_key=made["api_key"])
    with (
        openai.OpenAI(base_url=keyless.base_url, api_key=made["api_key"], max_retries=0) as through,
        way("sync in-process", "", poor) as inside,
    ):
        for client in (Way("poor", through, inside.runner), inside):
            for stream in (False, True):
                with pytest.raises(openai.APIStatusError) as caught:
                    client.raw(**ask("Hello"), stream=stream)
                error = told(openai.APIStatusError, caught.value)
                assert (error["status"], error["type"]) == (402, "insufficient_quota")
                assert f"./cocoon fund {made['account_id']} 1" in str(error["message"])
                assert caught.value.response.headers["x-should-retry"] == "false"
        assert network.cli("fund", made["account_id"], "0.001").returncode == 0
        done = through.chat.completions.create(**ask("Reverse: cocoon"))
        assert done.choices[0].message.content == "noococ"


def _refused_beside(client: Way) -> openai.APIStatusError | None:
    """What a request gets while another of the same key streams; None if that one had ended."""
    assert isinstance(client.client, openai.OpenAI)
    with client.client.chat.completions.create(**ENDLESS, max_tokens=600, stream=True) as running:
        next(iter(running))
        try:
            client.complete(**ask("Hello"))
        except openai.APIStatusError as error:
            return error
    return None


def test_more_jobs_than_a_key_may_have_is_429_with_retry_after(
    network: LiveNetwork, narrow_gateway: Gateway
) -> None:
    options = NetworkOptions(narrow_gateway.url, network.folder.trust, api_key=network.api_key)
    with way("sync in-process", "", options) as client:
        client.complete(**ask("Hello"))
        error = next(filter(None, (_refused_beside(client) for _ in range(5))))
        assert told(openai.RateLimitError, error)["code"] == "too_many_streams"
        assert int(error.response.headers["retry-after"]) >= 1
    with (
        way("sync in-process", "", options, max_retries=6) as patient,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        answers = list(pool.map(lambda _: patient.complete(**ask("Hello")), range(3)))
        assert len({answer.id for answer in answers}) == 3  # equal requests are three jobs


def test_a_deadline_is_504(network: LiveNetwork, hasty_gateway: Gateway) -> None:
    before = quiet_balance(network)
    options = NetworkOptions(hasty_gateway.url, network.folder.trust, api_key=network.api_key)
    with way("sync in-process", "", options) as client:
        error = refused(openai.InternalServerError, client, **ask("Hello"))
        assert (error["status"], error["type"]) == (504, "timeout_error")
    with connected(network, gateway_url=hasty_gateway.url) as place:  # and through a sidecar
        with (
            openai.OpenAI(
                base_url=place.base_url, api_key=network.api_key, max_retries=0
            ) as through,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            through.chat.completions.create(**ask("Hello"))
        assert caught.value.status_code == 504
    assert before - quiet_balance(network) < 20_000  # at most what had been made by then


def _until_refused(client: Way, deadline: float) -> openai.APIStatusError:
    while time.monotonic() < deadline:
        try:
            client.complete(**ask("Hello"))
        except openai.APIStatusError as error:
            return error
    pytest.fail("requests are answered without a provider")


def test_no_provider_is_503_with_retry_after_and_ends_by_itself(
    network: LiveNetwork, options: NetworkOptions, sidecar: Way
) -> None:
    provider = network.pid("provider")
    os.kill(provider, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 15
        while get(network, f"/v1/directory?model={MODEL}").json()["providers"]:
            assert time.monotonic() < deadline, "a silent provider stays listed"
            time.sleep(0.1)
        error = _until_refused(sidecar, deadline + 15)
        assert told(openai.InternalServerError, error)["status"] == 503
        assert error.type == "service_unavailable_error"
        assert int(error.response.headers["retry-after"]) >= 1
        with way("async in-process", "", options) as fresh:  # it knows nobody yet
            assert refused(openai.InternalServerError, fresh, **ask("Hello"))["status"] == 503
    finally:
        os.kill(provider, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while not get(network, f"/v1/directory?model={MODEL}").json()["providers"]:
        assert time.monotonic() < deadline, "the provider is not listed again"
        time.sleep(0.1)
    assert isinstance(sidecar.client, openai.OpenAI)
    again = sidecar.client.with_options(max_retries=5).chat.completions.create(
        **ask("Reverse: cocoon")
    )
    assert again.choices[0].message.content == "noococ"
