"""A client believes no gateway what a model id names: other bytes are refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest

from cocoon.client import Network, NetworkOptions, Sidecar, manifest_of
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    EvidenceRejected,
    Unavailable,
)
from cocoon.models import ModelManifest
from cocoon.models.manifest import MAX_PUBLISHED_BYTES, describe_server
from tests.support.client_world import KEY, TestNetwork, served, trust

ONE = describe_server("skills-1", {"model": "skills-1"})
TWO = describe_server("other", {})
SPACED = json.dumps(ONE.model_dump(mode="json"), indent=1).encode()


@pytest.fixture(scope="module")
def network() -> Iterator[TestNetwork]:
    world = TestNetwork()
    with served(world) as url:
        world.url = url
        yield world


async def through_network(url: str, model_id: str) -> ModelManifest:
    network = Network(NetworkOptions(gateway_url=url, trust=trust(), api_key=KEY))
    try:
        return await network.manifest_of(model_id)
    finally:
        await network.aclose()


WAYS = [manifest_of, through_network]


@pytest.mark.parametrize("way", WAYS)
def test_the_manifest_of_an_id_is_the_one_with_that_hash(network: TestNetwork, way) -> None:  # type: ignore[no-untyped-def]
    network.documents = {ONE.model_id: ONE.to_canonical()}
    assert asyncio.run(way(network.url, ONE.model_id)) == ONE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "document",
    [TWO.to_canonical(), SPACED, ONE.to_canonical() + b"\n", b"", b"[]", b'{"a":' * 9000],
    ids=lambda document: repr(document[:12]),
)
def test_a_gateway_that_gives_another_manifest_is_refused(  # type: ignore[no-untyped-def]
    network: TestNetwork, document: bytes, way
) -> None:
    network.documents = {ONE.model_id: document}
    with pytest.raises(EvidenceRejected) as caught:
        asyncio.run(way(network.url, ONE.model_id))
    assert caught.value.code == "manifest_mismatch"
    assert ONE.model_id in caught.value.message


def test_an_answer_that_is_too_long_is_dropped(network: TestNetwork) -> None:
    network.documents = {ONE.model_id: b" " * (MAX_PUBLISHED_BYTES + 1)}
    with pytest.raises(Unavailable, match="larger"):
        asyncio.run(manifest_of(network.url, ONE.model_id))


@pytest.mark.parametrize(
    ("model_id", "url", "kind"),
    [
        ("skills-1", "", BadRequest), ("../network", "", BadRequest),
        ("AB" * 32, "", BadRequest), ("cd" * 32, "http://127.0.0.1:9", Unavailable),
        ("cd" * 32, "nowhere", ConfigurationError),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said(
    network: TestNetwork, model_id: str, url: str, kind: type[CocoonError]
) -> None:
    with pytest.raises(kind):
        asyncio.run(manifest_of(url or network.url, model_id))


def test_the_sidecar_gives_a_checked_manifest_and_refuses_another(network: TestNetwork) -> None:
    options = NetworkOptions(gateway_url=network.url, trust=trust(), api_key=KEY, local_key="local")
    with (
        served(Sidecar(options), lifespan="on") as url,
        httpx.Client(base_url=url, headers={"authorization": "Bearer local"}) as http,
    ):
        network.documents = {ONE.model_id: ONE.to_canonical()}
        path = f"/v1/manifests/{ONE.model_id}"
        answer = http.get(path)
        assert (answer.status_code, answer.content) == (200, ONE.to_canonical())
        assert http.get(path, headers={"authorization": ""}).status_code == 401
        assert http.post(path).status_code == 405
        assert http.get("/v1/manifests/skills-1").status_code == 400
        network.documents = {ONE.model_id: TWO.to_canonical()}
        refused = http.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "manifest_mismatch")
