"""Answers that must never be shown, and lines that break: over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cocoon.client import NetworkOptions, openai_client, session
from cocoon.sealing import Status
from tests.support.client_world import KEY, TEXT, Faults, TestNetwork, served, trust

ASK: dict[str, Any] = {"model": "skills-1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world
        world.gate.set()


@pytest.fixture
def client(network: TestNetwork) -> Iterator[openai.OpenAI]:
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY)
    with openai_client(options, max_retries=0) as made:
        yield made


LIES = [
    (Faults(forged_receipt=True), "receipt_sig"),
    (Faults(no_receipt=True), "no_receipt"),
    (Faults(other_price=1), "wrong_price"),
    (Faults(other_price=-1), "wrong_price"),
    (Faults(other_quote=True), "receipt_mismatch"),
    (Faults(other_epoch=True), "receipt_mismatch"),
    (Faults(other_provider=True), "wrong_provider"),
    (Faults(other_usage=True), "bad_counts"),
    (Faults(flipped_byte=1), "decrypt_failed"),
    (Faults(flipped_byte=-1), "decrypt_failed"),
]


@pytest.mark.parametrize(("faults", "code"), LIES, ids=lambda value: str(value)[:60])
def test_an_answer_without_a_valid_receipt_is_not_shown(
    client: openai.OpenAI, network: TestNetwork, faults: Faults, code: str
) -> None:
    network.faults = faults
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**ASK)
    assert caught.value.status_code == 502
    assert caught.value.code == code
    assert "quick" not in str(caught.value.body)
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("faults", "code"), LIES, ids=lambda value: str(value)[:60])
def test_a_stream_without_a_valid_receipt_never_gets_its_last_chunk(
    client: openai.OpenAI, network: TestNetwork, faults: Faults, code: str
) -> None:
    network.faults = faults
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(client.chat.completions.create(**ASK, stream=True))
    assert caught.value.code == code
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cut_after", [0, 1, 2, -1])
def test_a_broken_line_is_continued_from_the_stored_response(
    client: openai.OpenAI, network: TestNetwork, stream: bool, cut_after: int
) -> None:
    pieces = 12 if stream else 4
    network.faults = Faults(cut_after=cut_after % pieces, cuts=2)
    answer = client.chat.completions.create(**ASK, stream=stream)
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == TEXT
    else:
        assert answer.choices[0].message.content == TEXT
    assert network.paid == 1
    assert network.faults.cuts < 2


def test_a_line_that_stays_broken_ends_with_what_was_charged(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    network.faults = Faults(cut_after=3, stored=False)
    chunks = []
    with pytest.raises(openai.APIError, match="nanoTON were charged") as caught:
        chunks.extend(client.chat.completions.create(**ASK, stream=True))
    assert caught.value.code == "truncated"
    assert chunks
    assert network.paid == 1


def test_a_cancelled_jobs_answer_is_an_error_that_names_its_cost(
    client: openai.OpenAI, network: TestNetwork
) -> None:
    network.faults = Faults(status=Status.CANCELLED)
    with pytest.raises(openai.ConflictError, match="nanoTON were charged"):
        client.chat.completions.create(**ASK)


def test_a_rotated_key_is_sealed_to_again_once(client: openai.OpenAI, network: TestNetwork) -> None:
    client.chat.completions.create(**ASK)
    network.enclaves[0].rotate()  # the client's directory still lists the old key
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == TEXT
    assert network.paid == 2
    assert len(network.seen) == 3


def test_a_gateway_that_always_asks_for_a_reseal_is_obeyed_once(
    client: openai.OpenAI, network: TestNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "REPLACED_AFTER_S", (0.01,))  # for another key to come
    told = {"error": {"message": "Seal again.", "type": "t", "param": None, "code": "reseal"}}
    network.faults = Faults(refuse=[(409, told, {})] * 3)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**ASK)
    assert (caught.value.status_code, caught.value.code) == (503, "reseal")  # worth a retry
    assert len(network.seen) == 2
    assert network.seen[0] != network.seen[1]


def test_an_unreachable_gateway_is_a_503_that_names_it() -> None:
    options = NetworkOptions(gateway_url="http://127.0.0.1:9", trust=trust(), api_key=KEY)
    with openai_client(options, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match=r"127\.0\.0\.1:9") as caught:
            client.chat.completions.create(**ASK)
        assert caught.value.status_code == 503
