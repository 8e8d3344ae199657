"""Published manifests over real NATS and Postgres: who may publish, who is told, what is kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from nats.aio.client import Client

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.base import Contract
from cocoon.contracts.messages import DirectoryRequest, ManifestRequest
from cocoon.kernel.errors import BadRequest, CocoonError, Forbidden, NotFound, RateLimited, TooLarge
from cocoon.models import ModelFile, ModelManifest
from cocoon.models.manifest import MAX_PUBLISHED_BYTES, describe_server
from services.attestation.manifests import PUBLISHED_AT_ONCE
from tests.support.attestation_world import Network, Provider, offered
from tests.support.sentences import is_sentence
from tests.support.servers import Bus, Database

ONE = describe_server("skills-1", {"model": "skills-1", "quantisation": "int8"})
TWO = describe_server("other", {"kind": "embeddings"})
THREE = describe_server("third", {})
LONG_AGO = "UPDATE attestation.manifests SET offered_ms = 1000"


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    made = Network(bus, database, tmp_path)
    made.write_policy(models=None)  # the policy takes any model
    return made


class Bytes(Contract):
    """A request's body as these bytes, whatever they are."""

    body: bytes

    def to_canonical(self) -> bytes:
        return self.body


async def serving(network: Network, *manifests: ModelManifest, index: int = 0) -> Provider:
    """A provider that stands attested with these models."""
    provider = await Provider.connect(network, index)
    await provider.enrol()
    await provider.attest(models=tuple(one.model_id for one in manifests))
    return provider


async def offer(provider: Provider, *manifests: ModelManifest) -> list[str]:
    """Offer these; returns the ids whose manifests the network asks for."""
    answer = await provider.publish_offer(*(offered(one.model_id, one.name) for one in manifests))
    wanted: list[str] = answer["manifests_wanted"]
    return wanted


async def fetched(network: Network, model_id: str) -> bytes:
    """What a gateway is answered."""
    gateway: Client = await network.bus.connect("gateway")
    text = await ask(gateway, subjects.MANIFEST_REQUEST, ManifestRequest(model_id=model_id))
    return text.encode()


async def rows(network: Network) -> list[Any]:
    conn = await asyncpg.connect(network.database.admin_dsn, timeout=10)
    try:
        return list(await conn.fetch("SELECT * FROM attestation.manifests ORDER BY published_ms"))
    finally:
        await conn.close()


async def execute(network: Network, sql: str, *values: Any) -> None:
    conn = await asyncpg.connect(network.database.admin_dsn, timeout=10)
    try:
        await conn.execute(sql, *values)
    finally:
        await conn.close()


async def test_a_manifest_is_asked_for_with_the_offer_and_then_given_to_gateways(
    network: Network,
) -> None:
    async with network.running():
        provider = await serving(network, ONE, TWO)
        with pytest.raises(NotFound, match="nobody has published"):
            await fetched(network, ONE.model_id)
        assert await offer(provider, ONE, TWO) == sorted([ONE.model_id, TWO.model_id])
        assert (await provider.ask("publish_manifest", ONE))["new"]
        assert await offer(provider, ONE, TWO) == [TWO.model_id]
        assert await fetched(network, ONE.model_id) == ONE.to_canonical()
        types = await network.types()
    async with network.running():  # it outlives the process
        assert await fetched(network, ONE.model_id) == ONE.to_canonical()
        assert await offer(provider, ONE, TWO) == [TWO.model_id]
    assert "Manifest" not in " ".join(types)  # not one of these is in the log


async def test_the_same_manifest_from_two_providers_is_one_row(network: Network) -> None:
    async with network.running():
        first, second = await serving(network, ONE), await serving(network, ONE, index=1)
        answers = await asyncio.gather(
            first.ask("publish_manifest", ONE), second.ask("publish_manifest", ONE)
        )
        assert sorted(answer["new"] for answer in answers) == [False, True]
        assert await offer(second, ONE) == []
    (row,) = await rows(network)
    assert bytes(row["document"]) == ONE.to_canonical()
    assert row["published_by"] in (first.provider_id, second.provider_id)


def spaced(manifest: ModelManifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), indent=1).encode()


def large() -> ModelManifest:
    files = tuple(
        ModelFile(path=f"{n:0500}", size_bytes=1, sha256="ab" * 32)
        for n in range(MAX_PUBLISHED_BYTES // 580)
    )
    return ONE.model_copy(update={"files": files})


REFUSED: list[tuple[str, type[CocoonError], Callable[[], bytes], bool]] = [
    ("manifest_mismatch", Forbidden, TWO.to_canonical, False),  # no evidence names it
    ("manifest_mismatch", Forbidden, lambda: ONE.to_canonical() + b" ", False),
    ("manifest_malformed", BadRequest, lambda: b"whatever hashes to an attested id", True),
    ("manifest_malformed", BadRequest, lambda: spaced(ONE), True),  # not canonical
    ("manifest_malformed", BadRequest, lambda: b'{"a":' * 50_000, True),
    ("manifest_malformed", BadRequest, lambda: b"\xff" * 64, True),
    ("manifest_too_large", TooLarge, large().to_canonical, True),
]


@pytest.mark.parametrize(("code", "kind", "body", "attested"), REFUSED)
async def test_bytes_that_are_no_attested_model_s_manifest_are_refused(
    network: Network, code: str, kind: type[CocoonError], body: Callable[[], bytes], attested: bool
) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        await provider.enrol()
        its_id = hashlib.sha256(body()).hexdigest()
        await provider.attest(models=(ONE.model_id, its_id) if attested else (ONE.model_id,))
        with pytest.raises(kind) as caught:
            await provider.ask("publish_manifest", Bytes(body=body()))
        assert (caught.value.code, is_sentence(caught.value.message)) == (code, True)
        with pytest.raises(NotFound):
            await fetched(network, its_id)
    assert await rows(network) == []


async def test_who_is_not_attested_publishes_nothing(network: Network) -> None:
    async with network.running():
        provider = await Provider.connect(network)
        with pytest.raises(NotFound, match="not enrolled"):
            await provider.ask("publish_manifest", ONE)
        await provider.enrol()
        with pytest.raises(Forbidden):
            await provider.ask("publish_manifest", ONE)
    assert await rows(network) == []


async def test_who_publishes_without_a_pause_is_told_to_wait(network: Network) -> None:
    async with network.running():
        provider = await serving(network, ONE)
        for _ in range(PUBLISHED_AT_ONCE):
            await provider.ask("publish_manifest", ONE)
        asking = asyncio.gather(*(provider.ask("publish_manifest", ONE) for _ in range(20)))
        with pytest.raises(RateLimited) as caught:
            await asking
    assert caught.value.code == "too_many_requests"


async def test_the_table_itself_takes_no_document_under_another_hash(network: Network) -> None:
    insert = "INSERT INTO attestation.manifests VALUES ($1, $2, 'chat', 'int8', 'prov_x', 1, 1)"
    async with network.running():
        pass
    await execute(network, insert, bytes.fromhex(ONE.model_id), ONE.to_canonical())
    for model_id, document in (
        (THREE.model_id, TWO.to_canonical()),
        (hashlib.sha256(bytes(300_000)).hexdigest(), bytes(300_000)),
    ):
        with pytest.raises(asyncpg.CheckViolationError):
            await execute(network, insert, bytes.fromhex(model_id), document)


async def test_a_full_table_keeps_what_is_offered_and_gives_up_what_is_not(
    network: Network,
) -> None:
    async with network.running(manifests=2):
        provider = await serving(network, ONE, TWO, THREE)
        await offer(provider, ONE)
        for manifest in (ONE, TWO):
            await provider.ask("publish_manifest", manifest)
        await provider.ask("publish_manifest", THREE)  # in the place of TWO, that nobody offers
        with pytest.raises(NotFound):
            await fetched(network, TWO.model_id)
        await offer(provider, ONE, THREE)
        with pytest.raises(RateLimited) as caught:
            await provider.ask("publish_manifest", TWO)
        assert caught.value.code == "too_many_manifests"
        for manifest in (ONE, THREE):
            assert await fetched(network, manifest.model_id) == manifest.to_canonical()
    assert len(await rows(network)) == 2


async def test_what_nobody_has_offered_for_long_is_forgotten_and_what_is_offered_is_not(
    network: Network,
) -> None:
    async with network.running():
        provider = await serving(network, ONE, TWO)
        await offer(provider, ONE)
        for manifest in (ONE, TWO):
            await provider.ask("publish_manifest", manifest)
    await execute(network, LONG_AGO)
    async with network.running():  # it looks once when it starts, then every hour
        for _ in range(200):
            if len(await rows(network)) == 1:
                break
            await asyncio.sleep(0.02)
        assert await fetched(network, ONE.model_id) == ONE.to_canonical()
        with pytest.raises(NotFound):
            await fetched(network, TWO.model_id)
    (row,) = await rows(network)
    assert (row["model_id"].hex(), row["offered_ms"] > 1000) == (ONE.model_id, True)


async def test_the_directory_says_what_the_manifest_says_once_it_is_there(
    network: Network,
) -> None:
    async def told() -> Any:
        await provider.beat()
        for _ in range(200):
            answer = await network.platform_ask("directory", DirectoryRequest(model="other"))
            if answer["providers"]:
                return answer["providers"][0]["manifest"]
            await asyncio.sleep(0.02)
        raise AssertionError("no provider came into the directory")

    async with network.running():
        provider = await serving(network, TWO)
        await offer(provider, TWO)
        await provider.publish_bundle()
        assert await told() is None
        await provider.ask("publish_manifest", TWO)
        expected = {"kind": "embeddings", "quantisation": "as-served"}
        assert await told() == expected
    async with network.running():
        assert await told() == expected


async def test_a_provider_cannot_ask_for_a_gateway_s_answer(network: Network) -> None:
    async with network.running():
        provider = await serving(network, ONE)
        with pytest.raises(CocoonError):
            await ask(
                provider.client, subjects.MANIFEST_REQUEST,
                ManifestRequest(model_id=ONE.model_id), timeout_s=0.5,
            )  # fmt: skip
