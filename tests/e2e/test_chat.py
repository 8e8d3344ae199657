"""Chat completions as the stock clients see them: bytes, counts, prices, receipts."""

from __future__ import annotations

import json
import time

import pytest
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer

from cocoon.kernel.errors import SealingError
from cocoon.sealing import Status, verify_receipt
from tests.support.asking import ENDLESS, MODEL, ask, attested_key, quiet_balance, wait_ended
from tests.support.network import ROOT, LiveNetwork
from tests.support.ways import Way

TOKENIZER = Tokenizer.from_file(str(ROOT / "models" / MODEL / "tokenizer.json"))


def text_of(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def prompt_tokens(text: str) -> int:
    return len(TOKENIZER.encode(f"<|user|>{text}<|assistant|>").ids)


def test_an_answer_is_whole_and_counted(client: Way) -> None:
    answer = client.complete(**ask("Reverse: cocoon"))
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == ("noococ", "assistant")
    assert (choice.finish_reason, choice.index, len(answer.choices)) == ("stop", 0, 1)
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt_tokens("Reverse: cocoon")
    assert answer.usage.completion_tokens == len(TOKENIZER.encode("noococ").ids)
    assert answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )


def test_a_stream_comes_in_openais_order_and_says_the_same(client: Way) -> None:
    chunks = client.stream(**ask("Reverse: cocoon"), stream_options={"include_usage": True})
    *content, last, usage = chunks
    assert content[0].choices[0].delta.role == "assistant"
    assert content[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in content[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in content) == "noococ"
    assert all(chunk.choices[0].finish_reason is None for chunk in content)
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.prompt_tokens == prompt_tokens("Reverse: cocoon")
    assert usage.usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_raw_stream_is_server_sent_events_to_the_letter(client: Way) -> None:
    for wants_usage in (True, False):
        options = {"stream_options": {"include_usage": True}} if wants_usage else {}
        headers, body = client.raw(**ask("Repeat: Hello, world!"), stream=True, **options)
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache"
        assert headers["x-cocoon-provider"].startswith("prov_")
        events = body.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(event.startswith(b"data: {") and b"\n" not in event for event in events[:-2])
        told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
        head = {
            "id": "chatcmpl-" + headers["x-cocoon-job-id"],
            "object": "chat.completion.chunk",
            "created": told[0]["created"],
            "model": MODEL,
            "system_fingerprint": told[0]["system_fingerprint"],
        }
        assert abs(head["created"] - time.time()) < 60
        tail = {"usage": None} if wants_usage else {}

        def chunk(delta: dict[str, object], finish: str | None = None) -> dict[str, object]:
            one = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {**head, "choices": [one], **tail}  # noqa: B023 - called in this round only

        deltas = told[1:-2] if wants_usage else told[1:-1]
        assert told[0] == chunk({"role": "assistant", "content": "", "refusal": None})
        assert deltas == [chunk({"content": d["choices"][0]["delta"]["content"]}) for d in deltas]
        spoken = "".join(d["choices"][0]["delta"]["content"] for d in deltas)
        assert spoken == "Hello, world!"
        assert told[len(deltas) + 1] == chunk({}, "stop")
        if wants_usage:
            assert told[-1].pop("usage")["total_tokens"] == prompt_tokens(
                "Repeat: Hello, world!"
            ) + len("Hello, world!")
            assert told[-1] == {**head, "choices": []}
        else:
            assert len(told) == len(deltas) + 2


def test_the_whole_body_is_json_with_the_facts_in_its_headers(client: Way) -> None:
    headers, body = client.raw(**ask("Uppercase: private inference"))
    told = json.loads(body)
    assert headers["content-type"] == "application/json"
    assert told["choices"][0]["message"]["content"] == "PRIVATE INFERENCE"
    facts = told["usage"]["cocoon"]
    assert told["id"] == "chatcmpl-" + facts["job_id"]
    assert headers["x-cocoon-job-id"] == facts["job_id"]
    assert headers["x-cocoon-provider"] == facts["provider_id"]
    assert headers["x-cocoon-cost-nanoton"] == facts["cost_nanoton"]
    assert facts["assurance"] == "simulated"


def test_a_bound_on_tokens_ends_an_answer_with_length(client: Way) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.complete(**ask("Count from 1 to 60"), **{name: 7})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        assert text_of(answer) == "1 2 3 4"
    chunks = client.stream(**ask("Count from 1 to 60"), max_tokens=7)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_sequence_ends_an_answer_before_it(client: Way) -> None:
    answer = client.complete(**ask("Count from 1 to 60"), stop=[" 4 ", "never"])
    assert text_of(answer) == "1 2 3"
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.stream(**ask("Count from 1 to 60"), stop=" 12")
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "1 2 3 4 5 6 7 8 9 10 11"


def test_a_seed_repeats_an_answer(sidecar: Way) -> None:
    first, same, other = (
        text_of(sidecar.complete(**ENDLESS, max_tokens=60, seed=seed)) for seed in (7, 7, 8)
    )
    assert first == same
    assert first != other


def test_log_probabilities_belong_to_the_answer(client: Way) -> None:
    answer = client.complete(**ask("Reverse: cocoon"), logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(token.token for token in told.content)[:6] == "noococ"
    for token in told.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob


def test_models_are_listed_and_retrieved(client: Way) -> None:
    models = client.models()
    assert [model.id for model in models] == [MODEL]
    found = client.model(MODEL)
    assert found == models[0]
    assert (found.object, found.owned_by) == ("model", "cocoon")


def test_a_conversation_with_a_system_message_goes_through(client: Way) -> None:
    messages = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [{"type": "text", "text": "Uppercase: one"}]},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "Uppercase: two"},
    ]
    assert text_of(client.complete(model=MODEL, messages=messages)) == "TWO"


@pytest.mark.parametrize("stream", [False, True])
def test_the_receipt_verifies_against_the_attested_key(
    network: LiveNetwork, client: Way, stream: bool
) -> None:
    before = quiet_balance(network)
    if stream:
        chunks = client.stream(**ask("Sort: 29 80 51 19"), stream_options={"include_usage": True})
        usage = chunks[-1].usage
    else:
        usage = client.complete(**ask("Sort: 29 80 51 19")).usage
    assert usage is not None
    facts = usage.model_dump()["cocoon"]
    key, evidence_id = attested_key(network, facts["provider_id"])
    raw = bytes.fromhex(facts["receipt"])
    receipt = verify_receipt(raw, key)
    assert receipt.status is Status.COMPLETE
    assert receipt.job_id.hex() == facts["job_id"]
    assert receipt.model_id.hex() == facts["model_id"]
    assert receipt.evidence_id == evidence_id
    assert str(receipt.price_nanoton) == facts["cost_nanoton"]
    # a stream is padded in time, so its counts are exact; a whole body's are rounded up
    rounded = (lambda n: n) if stream else (lambda n: -(-n // 64) * 64)
    assert receipt.input_tokens <= rounded(usage.prompt_tokens)
    assert receipt.input_tokens >= usage.prompt_tokens
    assert receipt.output_tokens == rounded(usage.completion_tokens)
    with pytest.raises(SealingError):
        verify_receipt(raw[:-1] + bytes([raw[-1] ^ 1]), key)
    job = wait_ended(network, facts["job_id"])
    assert job["price_nanoton"] == facts["cost_nanoton"]
    assert job["result"]["receipt"] == facts["receipt"]
    assert before - quiet_balance(network) == receipt.price_nanoton
