"""Stock OpenAI clients, through the in-process transports and the sidecar, over real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cocoon.client import (
    NetworkOptions,
    Sidecar,
    async_openai_client,
    openai_client,
    transport,
)
from cocoon.evidence.trust import trust_document
from tests.support.client_world import KEY, MODEL, TEXT, WORDS, TestNetwork, served, trust

ASK: dict[str, Any] = {
    "model": "skills-1",
    "messages": [{"role": "user", "content": "a canary: tangerine-42"}],
}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world
        world.gate.set()


def options(network: TestNetwork, **more: Any) -> NetworkOptions:
    return NetworkOptions(**{"gateway_url": network.url, "trust": trust(), "api_key": KEY, **more})


@pytest.fixture(params=["transport", "sidecar"])
def client(request: pytest.FixtureRequest, network: TestNetwork) -> Iterator[openai.OpenAI]:
    """A stock client either way; both must behave alike."""
    if request.param == "transport":
        with openai_client(options(network), max_retries=0) as made:
            yield made
        return
    with (
        served(Sidecar(options(network)), lifespan="on") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made,
    ):
        yield made


def test_an_answer_comes_with_its_cost_provider_and_receipt(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK)
    answer = raw.parse()
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None
    assert answer.usage.total_tokens == 18
    (ran,) = network.jobs.values()
    cocoon = answer.usage.model_dump()["cocoon"]
    assert cocoon["job_id"] == raw.headers["x-cocoon-job-id"]
    assert cocoon["provider_id"] == raw.headers["x-cocoon-provider"]
    assert raw.headers["x-cocoon-cost-nanoton"] == cocoon["cost_nanoton"] == str(ran.price)
    assert raw.headers["x-cocoon-model-id"] == cocoon["model_id"] == MODEL
    assert cocoon["assurance"] == "simulated"
    assert len(cocoon["receipt"]) == 840


def test_nothing_the_gateway_sees_holds_the_prompt(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    client.chat.completions.create(**ASK)
    assert b"tangerine" in network.bodies[0]  # the enclave read it
    assert network.seen
    assert not any(b"tangerine" in seen for seen in network.seen)


def test_a_stream_comes_in_chunks_with_usage_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == TEXT
    assert len(chunks) == len(WORDS) + 2
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)

    asked = client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    last = list(asked)[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 7
    assert len(last.usage.model_dump()["cocoon"]["receipt"]) == 840


def test_a_stream_names_its_job_and_greatest_cost_in_its_headers(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as raw:
        headers, body = raw.headers, raw.read()
    assert headers["content-type"].startswith("text/event-stream")
    (ran,) = network.jobs.values()
    assert headers["x-cocoon-job-id"] == ran.headers["x-cocoon-job-id"]
    assert headers["x-cocoon-model-id"] == MODEL
    assert int(headers["x-cocoon-max-cost-nanoton"]) >= ran.price
    events = body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(event.startswith(b"data: {") for event in events[:-2])


def test_models_are_listed_and_looked_up(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["skills-1"]
    assert client.models.retrieve("skills-1").id == "skills-1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_an_unknown_model_is_named_with_what_is_offered(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="skills-1") as caught:
        client.chat.completions.create(**{**ASK, "model": "gpt-9"})
    assert caught.value.code == "model_not_found"


def test_a_bad_parameter_is_refused_before_anything_is_sealed(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, n=2)
    assert caught.value.param == "n"
    assert network.directory_reads == 0


def test_other_endpoints_are_404_with_openais_error_object(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.moderations.create(input="text")
    assert caught.value.code == "unknown_url"


@pytest.mark.parametrize(
    ("status", "error", "headers"),
    [
        (401, openai.AuthenticationError, {}),
        (402, openai.APIStatusError, {}),
        (403, openai.PermissionDeniedError, {}),
        (429, openai.RateLimitError, {"retry-after": "7"}),
        (503, openai.InternalServerError, {"retry-after": "1"}),
        (504, openai.InternalServerError, {}),
    ],
)
def test_the_gateways_refusals_raise_the_stock_classes(
    client: openai.OpenAI, network: TestNetwork, status: int, error: Any, headers: dict[str, str]
) -> None:
    told = {"error": {"message": "Because.", "type": "t", "param": None, "code": "a_code"}}
    network.faults.refuse = [(status, told, headers)]
    with pytest.raises(error, match="Because") as caught:
        client.chat.completions.create(**ASK)
    assert caught.value.status_code == status
    assert caught.value.code == "a_code"
    assert caught.value.response.headers.get("retry-after") == headers.get("retry-after")


def test_an_enclaves_refusal_raises_the_stock_class_after_its_receipt(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    network.faults.error = {
        "error": {
            "message": "Too long.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        }
    }
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="Too long") as caught:
            client.chat.completions.create(**ASK, stream=stream)
        assert caught.value.code == "context_length_exceeded"


async def test_the_async_client_answers_and_streams(network: TestNetwork) -> None:
    async with async_openai_client(options(network)) as client:
        answer = await client.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == TEXT
        stream = await client.chat.completions.create(**ASK, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == TEXT


async def test_the_async_client_works_over_the_sidecar(network: TestNetwork) -> None:
    with served(Sidecar(options(network)), lifespan="on") as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            stream = await client.chat.completions.create(**ASK, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == TEXT


def test_the_transport_serves_plain_httpx_and_the_callers_own_key(network: TestNetwork) -> None:
    sealed = transport(options(network, api_key=None))
    with (
        httpx.Client(transport=sealed) as http,
        openai.OpenAI(base_url="http://sealed/v1", api_key=KEY, http_client=http) as client,
    ):
        assert client.chat.completions.create(**ASK).choices[0].message.content == TEXT
    with (
        httpx.Client(transport=transport(options(network, api_key=None))) as http,
        openai.OpenAI(base_url="http://sealed/v1", api_key="ck_wrong", http_client=http) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(**ASK)


def test_a_callers_timeout_is_openais_timeout(network: TestNetwork) -> None:
    network.faults.slow_first = True
    with (
        openai_client(options(network), max_retries=0, timeout=0.3) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(**ASK)


def test_every_padding_profile_answers(network: TestNetwork) -> None:
    from cocoon.sealing import Profile  # the names of the choices

    for body, stream in ((Profile.P0, Profile.P1), (Profile.P3, Profile.P3)):
        chosen = options(network, body_profile=body, stream_profile=stream)
        with openai_client(chosen, max_retries=0) as client:
            assert client.chat.completions.create(**ASK).choices[0].message.content == TEXT
            chunks = client.chat.completions.create(**ASK, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT


def test_a_trace_is_continued_at_the_gateway(network: TestNetwork) -> None:
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    with openai_client(options(network)) as client:
        client.chat.completions.create(**ASK, extra_headers={"traceparent": trace})
        client.chat.completions.create(**ASK)
    told = [ran.traceparent for ran in network.jobs.values()]
    assert told[0].startswith(trace[:36])
    assert told[0] != trace
    assert told[1][3:35] != told[0][3:35]


def test_answers_are_json_that_says_nothing_else(network: TestNetwork) -> None:
    with openai_client(options(network)) as client:
        raw = client.chat.completions.with_raw_response.create(**ASK)
    body = json.loads(raw.text)
    assert body["object"] == "chat.completion"
    assert raw.headers["content-type"] == "application/json"


def test_a_program_that_does_not_close_its_client_ends_without_a_word(
    network: TestNetwork, tmp_path: Path
) -> None:
    trust_file = tmp_path / "trust.json"
    trust_file.write_bytes(trust_document(trust()))
    script = f"""
from cocoon.client import NetworkOptions, openai_client
options = NetworkOptions(gateway_url={network.url!r}, trust={str(trust_file)!r}, api_key={KEY!r})
client = openai_client(options)
for _ in client.chat.completions.create(stream=True, **{ASK!r}):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_connect_says_at_once_that_a_key_is_wrong(network: TestNetwork, tmp_path: Path) -> None:
    trust_file = tmp_path / "trust.json"
    trust_file.write_bytes(trust_document(trust()))
    wrong = ["--gateway", network.url, "--trust", str(trust_file), "--key", "ck_" + "x" * 43]
    done = subprocess.run(
        [sys.executable, "-m", "cocoon.cli", "connect", "--port", "0", *wrong],
        capture_output=True, timeout=60, check=False, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "does not know this key" in done.stderr
    assert "Traceback" not in done.stderr
