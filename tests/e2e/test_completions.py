"""Completions as the stock clients see them: raw text continued, in OpenAI's objects."""

from __future__ import annotations

import json

import openai
import pytest

from cocoon.sealing import Status, verify_receipt
from tests.support.asking import MODEL, attested_key, quiet_balance, wait_ended
from tests.support.network import LiveNetwork
from tests.support.ways import Way

ASKED = {"model": MODEL, "prompt": "hello there", "temperature": 0}


def test_a_text_is_continued_and_counted(client: Way) -> None:
    answer = client.continue_text(**ASKED)
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.index) == ("text_completion", MODEL, 0)
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("hello there")  # a byte is a token here
    assert answer.usage.completion_tokens == len(choice.text) == 16  # OpenAI's own bound
    assert choice.finish_reason == "length"


def test_a_stream_says_the_same(client: Way) -> None:
    whole = client.continue_text(**ASKED).choices[0].text
    chunks = client.stream_text(**ASKED, stream_options={"include_usage": True})
    *content, last, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in content) == whole
    assert all(chunk.choices[0].finish_reason is None for chunk in content)
    assert (last.choices[0].finish_reason, last.choices[0].text) == ("length", "")
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 11 + 16
    assert usage.usage.model_dump()["cocoon"]["job_id"] in usage.id
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_have_completions_own_form(client: Way) -> None:
    answer = client.continue_text(**ASKED, logprobs=2, max_tokens=5)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.text_offset == [0, 1, 2, 3, 4]
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    for token, logprob, rivals in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert len(rivals) == 2
        assert rivals[token] == logprob <= 0


def test_stop_seed_and_bounds_are_honoured(client: Way) -> None:
    whole = client.continue_text(**ASKED, max_tokens=20).choices[0].text
    stopped = client.continue_text(**ASKED, max_tokens=20, stop=whole[4:6]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[4:6])], "stop")
    hot = {**ASKED, "temperature": 2, "max_tokens": 20}
    first, same, other = (
        client.continue_text(**hot, seed=seed).choices[0].text for seed in (7, 7, 8)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "."}, "suffix"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    sidecar: Way, asked: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sidecar.continue_text(**{**ASKED, **asked})
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_the_receipt_verifies_against_the_attested_key(
    network: LiveNetwork, sidecar: Way, stream: bool
) -> None:
    before = quiet_balance(network)
    if stream:
        usage = sidecar.stream_text(**ASKED, stream_options={"include_usage": True})[-1].usage
    else:
        usage = sidecar.continue_text(**ASKED).usage
    assert usage is not None
    facts = usage.model_dump()["cocoon"]
    key, evidence_id = attested_key(network, facts["provider_id"])
    receipt = verify_receipt(bytes.fromhex(facts["receipt"]), key)
    assert (receipt.status, receipt.evidence_id) == (Status.LENGTH, evidence_id)
    assert receipt.output_tokens == 16
    job = wait_ended(network, facts["job_id"])
    assert job["price_nanoton"] == facts["cost_nanoton"]
    assert before - quiet_balance(network) == receipt.price_nanoton


def test_a_gateway_takes_no_plaintext_at_the_new_addresses_either(network: LiveNetwork) -> None:
    client = openai.OpenAI(base_url=f"{network.gateway}/v1", api_key=network.api_key, max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**ASKED)  # type: ignore[call-overload]
    assert caught.value.code == "plaintext_refused"
    assert "hello" not in json.dumps(caught.value.body)
