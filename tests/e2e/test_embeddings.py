"""Embeddings through the whole network: the stock client in, vectors of the real MiniLM out."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import CreateEmbeddingResponse

from cocoon.client import NetworkOptions
from cocoon.devnet import minilm
from cocoon.models.kept import load
from cocoon.sealing import Status, verify_receipt
from tests.support.asking import ask, attested_key, get, quiet_balance, sql, wait_ended
from tests.support.minilm import need_minilm
from tests.support.network import LiveNetwork
from tests.support.ways import NAMES, Way, way

MODEL = minilm.NAME
LOVELY, SUNNY, DROVE = (
    "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.",
)  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    need_minilm()
    folder = Path(tempfile.mkdtemp(prefix="cocoon-embeddings-"))
    try:
        with LiveNetwork(folder / "data", ("--embeddings",)) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def options(network: LiveNetwork) -> NetworkOptions:
    return NetworkOptions(network.gateway, network.folder.trust, api_key=network.api_key)


@pytest.fixture(scope="module", params=NAMES)
def client(
    request: pytest.FixtureRequest, network: LiveNetwork, options: NetworkOptions
) -> Iterator[Way]:
    with way(request.param, network.sidecar, options) as found:
        yield found


@pytest.fixture(scope="module")
def sidecar(network: LiveNetwork, options: NetworkOptions) -> Iterator[Way]:
    with way("sync sidecar", network.sidecar, options) as found:
        yield found


def similarity(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def refusal(client: Way, **asked: Any) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embed(**{"model": MODEL, "input": "x", **asked})
    assert caught.value.status_code == 400
    body = caught.value.body
    assert isinstance(body, dict)
    return body


def test_vectors_come_back_as_the_model_was_published(client: Way) -> None:
    """The client asks for base64 by itself, and shows numbers."""
    made = client.embed(model=MODEL, input=[LOVELY, SUNNY, DROVE])
    assert isinstance(made, CreateEmbeddingResponse)
    assert [item.index for item in made.data] == [0, 1, 2]
    assert (made.object, made.model) == ("list", MODEL)
    lovely, sunny, drove = (item.embedding for item in made.data)
    assert math.hypot(*lovely) == pytest.approx(1, abs=1e-5)
    assert similarity(lovely, sunny) == pytest.approx(0.6660, abs=0.01)
    assert similarity(lovely, drove) == pytest.approx(0.1046, abs=0.01)
    assert made.usage.prompt_tokens == made.usage.total_tokens == 8 + 9 + 8


def test_numbers_and_base64_are_the_same_vector(client: Way) -> None:
    as_numbers = client.embed(model=MODEL, input=LOVELY, encoding_format="float")
    by_default = client.embed(model=MODEL, input=LOVELY)
    assert len(as_numbers.data[0].embedding) == 384
    assert as_numbers.data[0].embedding == pytest.approx(by_default.data[0].embedding, abs=1e-7)
    as_text = client.embed(model=MODEL, input=LOVELY, encoding_format="base64")
    assert isinstance(as_text.data[0].embedding, str)


def test_input_alone_is_billed_by_a_receipt_that_verifies(
    network: LiveNetwork, client: Way
) -> None:
    before = quiet_balance(network)
    made = client.embed(model=MODEL, input=["one text", "and another"])
    facts = made.usage.model_dump()["cocoon"]
    key, evidence_id = attested_key(network, facts["provider_id"], MODEL)
    receipt = verify_receipt(bytes.fromhex(facts["receipt"]), key)
    assert (receipt.status, receipt.evidence_id) == (Status.COMPLETE, evidence_id)
    assert receipt.model_id.hex() == load(minilm.MANIFEST).model_id == facts["model_id"]
    assert (receipt.output_tokens, receipt.reasoning_tokens) == (0, 0)
    assert receipt.input_tokens % 64 == 0  # public counts of one body are rounded up
    assert receipt.input_tokens >= made.usage.prompt_tokens == 8
    job = wait_ended(network, facts["job_id"])
    assert job["price_nanoton"] == facts["cost_nanoton"] == str(receipt.price_nanoton)
    assert before - quiet_balance(network) == receipt.price_nanoton > 0


def test_what_is_public_of_a_request_names_no_endpoint(network: LiveNetwork, sidecar: Way) -> None:
    made = sidecar.embed(model=MODEL, input="x" * 100)
    job_id = made.usage.model_dump()["cocoon"]["job_id"]
    wait_ended(network, job_id)
    told = [data for (data,) in sql(network, "SELECT data FROM log.events") if job_id in data]
    assert len(told) >= 5
    assert not any("embeddings" in data or "v1/" in data for data in told)


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file that is there when it is read: a spool's journals come and go."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if path.is_file():
                yield path, path.read_bytes()


def test_no_text_of_an_input_is_anywhere_in_the_network(network: LiveNetwork, sidecar: Way) -> None:
    made = sidecar.embed(model=MODEL, input=["canarybird sings", "another canarybird"])
    wait_ended(network, made.usage.model_dump()["cocoon"]["job_id"])
    found = dict(contents(network.data))
    assert len(found) > 100  # Postgres, NATS, the spools, all logs
    assert not [path for path, data in found.items() if b"canarybird" in data]


def test_many_inputs_more_than_one_context_together_are_served(sidecar: Way) -> None:
    made = sidecar.embed(model=MODEL, input=[f"text number {number}" for number in range(300)])
    assert len(made.data) == 300
    assert made.usage.prompt_tokens > 1000


def test_what_is_too_long_is_refused_inside_and_free(network: LiveNetwork, sidecar: Way) -> None:
    before = quiet_balance(network)
    told = refusal(sidecar, input=["short", "word " * 300])
    assert (told["code"], told["param"]) == ("context_length_exceeded", "input")
    assert "Input 1 has 302 tokens and this model reads 256" in told["message"]
    assert quiet_balance(network) == before


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"dimensions": 128}, "dimensions", "unsupported_value"),
        ({"input": [1, 2, 3]}, "input", "unsupported_value"),
        ({"input": ""}, "input[0]", "invalid_value"),
        ({"extra_body": {"stream": True}}, "stream", "unknown_parameter"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    sidecar: Way, asked: dict[str, Any], param: str, code: str
) -> None:
    told = refusal(sidecar, **asked)
    assert (told["param"], told["code"]) == (param, code)


def test_a_model_refuses_the_endpoint_of_another_kind(sidecar: Way) -> None:
    assert refusal(sidecar, model="skills-1")["code"] == "wrong_endpoint"
    for asked in (
        lambda: sidecar.complete(**{**ask("x"), "model": MODEL}),
        lambda: sidecar.continue_text(model=MODEL, prompt="x"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            asked()
        assert caught.value.code == "wrong_endpoint"
        assert "is for /v1/embeddings" in caught.value.message


def test_the_same_key_for_another_endpoint_is_another_request(sidecar: Way) -> None:
    headers = {"Idempotency-Key": "one-key"}
    body = {"model": "skills-1", "extra_headers": headers}
    sidecar.continue_text(prompt="hello there", **body)
    with pytest.raises(openai.ConflictError) as caught:
        sidecar.embed(**{**body, "model": MODEL}, input="x")
    assert caught.value.code == "idempotency_mismatch"


def test_both_models_are_listed(network: LiveNetwork) -> None:
    listed = {one["id"]: one["cocoon"] for one in get(network, "/v1/models").json()["data"]}
    assert set(listed) == {"skills-1", MODEL}
    assert listed[MODEL]["model_id"] == load(minilm.MANIFEST).model_id
    assert listed[MODEL]["context_tokens"] == 65_536
