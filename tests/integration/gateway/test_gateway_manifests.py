"""GET /v1/manifests/{id}: the bytes that hash to the id, asked for once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from nats.aio.msg import Msg

from cocoon.contracts import subjects
from cocoon.contracts.messages import ErrorBody, ManifestRequest, Reply
from cocoon.models.manifest import describe_server
from services.gateway import manifests as cache
from tests.support.gateway_world import World, gateway_world
from tests.support.servers import Bus, Database

ONE = describe_server("skills-1", {"model": "skills-1"})
TWO = describe_server("other", {"note": "ü" * 2000})
LYING = describe_server("lying", {})


@pytest.fixture
async def world(bus: Bus, database: Database) -> AsyncIterator[World]:
    async with gateway_world(bus, database) as running:
        yield running


async def attestation(world: World) -> list[str]:
    """Answers as attestation does; returns the ids that it is asked for."""
    asked: list[str] = []
    known = {one.model_id: one.to_canonical() for one in (ONE, TWO)}
    known[LYING.model_id] = ONE.to_canonical()

    async def answer(message: Msg) -> None:
        model_id = ManifestRequest.model_validate_json(message.data).model_id
        asked.append(model_id)
        document = known.get(model_id)
        if document is not None:
            reply = Reply(ok=True, data=document.decode())
        else:
            body = ErrorBody(status=404, code="manifest_not_found", message="nobody has it")
            reply = Reply(ok=False, error=body)
        await message.respond(reply.to_canonical())

    nc = await world.bus.connect("attestation")
    await nc.subscribe(subjects.MANIFEST_REQUEST, cb=answer)
    await nc.flush()
    return asked


async def test_a_manifest_is_given_to_everybody_as_what_never_changes(world: World) -> None:
    asked = await attestation(world)
    path = f"/v1/manifests/{TWO.model_id}"
    answers = await asyncio.gather(*(world.http.get(path) for _ in range(8)))  # without a key
    for answer in (*answers, await world.http.get(path)):
        assert (answer.status_code, answer.content) == (200, TWO.to_canonical())
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["etag"] == f'"{TWO.model_id}"'
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert asked == [TWO.model_id]


async def test_what_is_not_there_is_404_with_a_sentence_and_asked_for_again(world: World) -> None:
    asked = await attestation(world)
    absent = "ab" * 32
    for _ in range(2):
        answer = await world.http.get(f"/v1/manifests/{absent}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "nobody has it")
        assert answer.headers["cache-control"] == "no-store"
    assert asked == [absent, absent]
    for wrong in ("", "skills-1", "AB" * 32, "ab" * 31, f"{absent}/x", "..%2f" * 9):
        answer = await world.http.get(f"/v1/manifests/{wrong}")
        assert answer.status_code == 404, wrong
        assert "64 hex digits" in answer.json()["error"]["message"]
    answer = await world.http.post(f"/v1/manifests/{ONE.model_id}", content=b"{}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert len(asked) == 2


async def test_bytes_with_another_hash_are_not_passed_on(world: World) -> None:
    asked = await attestation(world)
    for _ in range(2):
        answer = await world.http.get(f"/v1/manifests/{LYING.model_id}")
        assert answer.status_code == 503
        assert answer.headers["cache-control"] == "no-store"
    assert asked == [LYING.model_id] * 2


async def test_the_memory_of_manifests_is_bounded_in_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await attestation(world)
    monkeypatch.setattr(cache, "MAX_CACHED_BYTES", len(TWO.to_canonical()) + 10)
    for one in (ONE, TWO, TWO, ONE):
        answer = await world.http.get(f"/v1/manifests/{one.model_id}")
        assert answer.content == one.to_canonical()
    assert asked == [ONE.model_id, TWO.model_id, ONE.model_id]


async def test_an_absent_attestation_is_503(world: World) -> None:
    answer = await world.http.get(f"/v1/manifests/{ONE.model_id}")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
