"""A client that is billed for tokens which it does not count says so by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cocoon.client import NetworkOptions, openai_client
from cocoon.contracts.messages import Dispute
from cocoon.sealing import Receipt
from tests.support.client_world import KEY, TEXT, Faults, TestNetwork, served, trust

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world
        world.gate.set()


@contextmanager
def client(network: TestNetwork, **options: Any) -> Iterator[openai.OpenAI]:
    found = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY, **options)
    with openai_client(found, max_retries=0) as made:
        yield made


def asked(network: TestNetwork, *, stream: bool, **options: Any) -> tuple[str, dict[str, Any]]:
    """The answer's text and its `usage.cocoon`."""
    with client(network, **options) as made:
        if not stream:
            answer = made.chat.completions.create(**ASK)
            assert answer.usage is not None
            return str(answer.choices[0].message.content), answer.usage.model_dump()["cocoon"]
        more = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(made.chat.completions.create(**ASK, **more))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage.model_dump()["cocoon"]


def disputes(network: TestNetwork, count: int) -> list[tuple[str, Dispute]]:
    """They go out beside the answer: wait for so many."""
    deadline = time.monotonic() + 10
    while len(network.disputes) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [(job, Dispute.model_validate_json(body)) for job, body in network.disputes]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_no_text_shows_are_disputed_and_the_answer_is_given(
    network: TestNetwork, stream: bool
) -> None:
    network.faults = Faults(more_tokens=300)
    text, told = asked(network, stream=stream)
    assert text == TEXT
    ((job, sent),) = disputes(network, 1)
    assert job == told["job_id"]
    assert (sent.kind, sent.counted_by) == ("output_tokens", "bytes")
    assert sent.own_output_tokens == len(TEXT.encode())
    receipt = Receipt.decode(bytes.fromhex(sent.receipt))
    assert receipt.job_id.hex() == job
    assert receipt.output_tokens >= 307
    assert told["dispute"] == json.loads(sent.model_dump_json(exclude={"receipt"}))


@pytest.mark.parametrize("stream", [False, True])
def test_an_honest_receipt_opens_none(network: TestNetwork, stream: bool) -> None:
    text, told = asked(network, stream=stream)
    assert text == TEXT
    assert "dispute" not in told
    assert network.disputes == []


def test_the_model_s_tokenizer_sees_what_bytes_cannot(network: TestNetwork, tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    network.faults = Faults(more_tokens=150)
    _, told = asked(network, stream=True)
    assert "dispute" not in told
    _, told = asked(network, stream=True, tokenizers={"skills-1": tmp_path})
    ((_, sent),) = disputes(network, 1)
    assert sent.counted_by == told["dispute"]["counted_by"] == "tokenizer"
    assert sent.own_output_tokens < 20


def test_a_gateway_that_is_away_is_told_later_and_one_that_refuses_is_left(
    network: TestNetwork,
) -> None:
    away = (503, {"error": {"message": "away", "code": "x"}})
    wrong = (403, {"error": {"message": "no", "code": "wrong_receipt"}})
    network.faults = Faults(more_tokens=300, refuse_disputes=[away, wrong])
    with client(network) as made:
        made.chat.completions.create(**ASK)
        first, again = disputes(network, 2)
        assert first == again
    assert len(network.disputes) == 2
