"""The gateway's door: keys, refusals, limits, the log's account of a job, directory and balance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from nats.aio.msg import Msg

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.events import JobFailed
from cocoon.contracts.messages import (
    BalanceRequest,
    CreateKeyRequest,
    DirectoryRequest,
    JobRequest,
    Reply,
    RevokeKeyRequest,
)  # fmt: skip
from cocoon.kernel.errors import BadRequest, Conflict, NotFound
from cocoon.sealing import MAX_ENVELOPE_BYTES
from tests.support.gateway_world import (
    ACCOUNT,
    Dispatch,
    World,
    append,
    envelope,
    gateway_world,
    until,
)  # fmt: skip
from tests.support.servers import Bus, Database

STRANGER = "acct_00000000000000b2"


@pytest.fixture
async def world(bus: Bus, database: Database) -> AsyncIterator[World]:
    async with gateway_world(bus, database, key_ttl_s=3600) as running:
        yield running


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


async def test_a_request_without_a_live_key_is_refused_with_what_to_do(world: World) -> None:
    _, sealed = envelope()
    for key, shown in [(None, "missing_api_key"), ("nonsense", "invalid_api_key"),
                       ("Bearer ck_short", "invalid_api_key"),
                       ("Bearer ck_" + "A" * 43, "invalid_api_key")]:  # fmt: skip
        headers = {"content-type": "application/vnd.cocoon.cai1"}
        if key is not None:
            headers["authorization"] = key
        response = await world.http.post("/v1/jobs", content=sealed, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert code(response) == shown
        assert response.json()["error"]["type"] == "authentication_error"
    assert world.matcher.requests == []


async def test_a_revoked_key_is_refused_immediately(world: World) -> None:
    _, sealed = envelope()
    assert (await world.post(sealed)).status_code == 200  # now it is cached for an hour
    await world.revoke_key()
    _, sealed = envelope()
    assert (await world.post(sealed)).status_code == 401
    assert len(world.matcher.requests) == 1


async def test_a_key_revoked_by_another_gateway_is_forgotten_here(
    bus: Bus, database: Database
) -> None:
    """A second gateway, or anybody with SQL: the database tells."""
    async with gateway_world(bus, database, key_ttl_s=3600) as world:
        assert (await world.get("/v1/jobs/" + "0" * 32)).status_code == 404
        conn = await asyncpg.connect(database.admin_dsn)
        await conn.execute("UPDATE gateway.api_keys SET revoked_at = now()")
        await conn.close()
        async with asyncio.timeout(5):
            while (await world.get("/v1/jobs/" + "0" * 32)).status_code != 401:
                pass


async def test_operators_make_list_and_revoke_keys(world: World) -> None:
    await world.create_key("key_b2", STRANGER)
    listed = json.loads(await ask(world.operator, subjects.gateway_keys("list")))["keys"]
    assert [k["api_key_id"] for k in listed] == ["key_b2", "key_a1"]
    assert "secret_hash" not in listed[0]
    assert listed[0]["revoked_ms"] is None
    revoke = subjects.gateway_keys("revoke"), RevokeKeyRequest(api_key_id="key_b2")
    first = json.loads(await ask(world.operator, *revoke))
    again = json.loads(await ask(world.operator, *revoke))
    assert (first.pop("revoked_before"), again.pop("revoked_before")) == (False, True)
    assert first == again  # the time of the first one stays
    assert first["revoked_ms"] >= listed[0]["created_ms"]
    with pytest.raises(NotFound):
        await ask(
            world.operator, subjects.gateway_keys("revoke"), RevokeKeyRequest(api_key_id="key_c3")
        )
    with pytest.raises(Conflict):
        await ask(
            world.operator,
            subjects.gateway_keys("create"),
            CreateKeyRequest(
                api_key_id="key_a1", secret_hash="0" * 64, account_id=ACCOUNT, label=""
            ),
        )
    with pytest.raises(BadRequest):
        await ask(world.operator, subjects.gateway_keys("create"))


async def test_a_plaintext_request_is_refused_and_names_the_sidecar(world: World) -> None:
    canary = "a very private prompt"
    for path, headers in [
        ("/v1/chat/completions", {}),
        ("/v1/embeddings", world.headers() | {"content-type": "application/json"}),
        ("/v1/jobs", world.headers() | {"content-type": "application/json"}),
    ]:
        response = await world.http.post(path, json={"messages": canary}, headers=headers)
        assert response.status_code == 400
        assert code(response) == "plaintext_refused"
        message = response.json()["error"]["message"]
        assert f"./cocoon connect --gateway http://127.0.0.1:{world.port}" in message
        assert canary not in response.text


async def test_who_opens_the_address_is_told_what_it_is(world: World) -> None:
    for headers in ({}, world.headers()):
        for method in ("GET", "HEAD"):
            response = await world.http.request(method, "/", headers=headers)
            assert response.status_code == 404
        error = (await world.http.get("/", headers=headers)).json()["error"]
        assert (error["type"], error["code"]) == ("not_found_error", "not_found")
        for told in ("gateway of the Cocoon network", "./cocoon connect", "docs/openapi.json"):
            assert told in error["message"]
    assert (await world.http.get("/x")).status_code == 401


async def test_what_is_not_a_sealed_request_is_refused(world: World) -> None:
    _, sealed = envelope()
    for body, shown in [
        (b'{"messages": []}', "bad_magic"),
        (sealed[:100], "truncated"),
        (b"", "truncated"),
        (sealed[:5] + b"\x02" + sealed[6:], "bad_suite"),
    ]:
        response = await world.post(body)
        assert response.status_code == 400
        assert code(response) == shown
    response = await world.post(sealed, Idempotency_Key="x" * 256)
    assert response.status_code == 400
    assert (await world.get("/v1/nothing")).status_code == 404
    for method, path, allowed in [
        ("PUT", "/v1/jobs", "POST"), ("POST", "/v1/models", "GET"),
        ("PATCH", "/v1/jobs/" + "0" * 32, "GET, DELETE"),
        ("DELETE", f"/v1/jobs/{'0' * 32}/response", "GET"),
    ]:  # fmt: skip
        response = await world.http.request(method, path, headers=world.headers())
        assert response.status_code == 405
        assert response.headers["allow"] == allowed
        assert code(response) == "method_not_allowed"
    assert world.matcher.requests == []


async def test_an_envelope_over_the_limit_is_refused_before_and_while_reading(
    world: World,
) -> None:
    limit = MAX_ENVELOPE_BYTES
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n"
        "content-type: application/vnd.cocoon.cai1\r\n"
    )
    writer.write(f"{head}expect: 100-continue\r\ncontent-length: {limit + 1}\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()

    async def endless() -> AsyncIterator[bytes]:
        yield b"CAI1"
        for _ in range(9 * 16):
            yield bytes(64 * 1024)

    response = await world.http.post("/v1/jobs", content=endless(), headers=world.headers())
    assert response.status_code == 413
    assert code(response) == "request_too_large"


async def test_a_refused_body_is_dropped_and_the_connection_stays_usable(world: World) -> None:
    """The answer comes although the body is still on its way; only so much is taken after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    ask_models = b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n"
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.write(bytes(1_000_000) + ask_models)
    rest = await reader.readuntil(b"HTTP/1.1 401")
    assert b"plaintext_refused" in rest
    with pytest.raises(ConnectionError):  # noqa: PT012 - one of the writes fails
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90000000\r\n\r\n"
        )
        for _ in range(90):
            writer.write(bytes(1_000_000))
            await writer.drain()
    writer.close()


async def test_a_slow_body_and_a_large_head_end_the_connection(
    bus: Bus, database: Database
) -> None:
    changes = {"body_timeout_s": 0.2, "header_timeout_s": 0.5, "max_header_bytes": 4096}
    async with gateway_world(bus, database, **changes) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(
            f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n"
            "content-type: application/vnd.cocoon.cai1\r\ncontent-length: 500\r\n\r\nCAI1".encode()
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 504")
        writer.close()
        response = await world.http.get("/v1/network", headers={"x-long": "y" * 8192})
        assert response.status_code == 431
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(b"GET /v1/network HTTP/1.1\r\nhost:")
        assert await reader.read() == b""  # closed: the head never ended
        writer.close()


async def test_a_key_has_a_bound_on_its_open_jobs(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_jobs_per_key=2) as world:
        go_on = asyncio.Event()

        async def hold(job: Dispatch) -> None:
            async def later() -> None:
                await go_on.wait()
                await world.provider.send_all(job)

            world.extra[job.job_id] = asyncio.create_task(later())

        world.provider.run = hold
        running = [asyncio.create_task(world.post(envelope()[1])) for _ in range(2)]
        await until(lambda: len(world.provider.dispatches) == 2)
        refused = await world.post(envelope()[1])
        assert refused.status_code == 429
        assert code(refused) == "too_many_streams"
        assert int(refused.headers["retry-after"]) >= 1
        go_on.set()
        assert [(await task).status_code for task in running] == [200, 200]
        assert (await world.post(envelope()[1])).status_code == 200
        await asyncio.gather(*world.extra.values())


async def test_unanswered_requests_are_bounded(bus: Bus, database: Database) -> None:
    async with gateway_world(bus, database, max_unmatched_jobs=1) as world:
        asked = asyncio.Event()

        async def nothing(_request: JobRequest) -> None:
            asked.set()

        world.matcher.on_request = nothing
        first = asyncio.create_task(world.post(envelope()[1]))
        await asked.wait()
        refused = await world.post(envelope()[1])
        assert refused.status_code == 429
        assert code(refused) == "gateway_full"
        assert (await first).status_code == 503


async def test_the_owner_reads_status_price_and_response(world: World) -> None:
    job_id, sealed = envelope()
    assert (await world.get(f"/v1/jobs/{job_id}")).status_code == 404
    await world.post(sealed)
    running = await world.get(f"/v1/jobs/{job_id}/response")
    assert running.status_code == 409
    assert code(running) == "job_running"
    told = (await world.get(f"/v1/jobs/{job_id}")).json()
    assert told["status"] == "matched"
    assert told["price_nanoton"] is None
    await world.provider.settle(job_id, price_nanoton=4321)

    told = (await world.get(f"/v1/jobs/{job_id}")).json()
    assert told["status"] == "settled"
    assert told["price_nanoton"] == "4321"
    assert told["provider_id"] == world.provider.id
    whole = await world.get(f"/v1/jobs/{job_id}/response")
    assert whole.status_code == 200
    assert whole.content == world.provider.response
    rest = await world.get(f"/v1/jobs/{job_id}/response", Range="bytes=1234-")
    assert rest.status_code == 206
    assert rest.content == world.provider.response[1234:]
    size = len(world.provider.response)
    assert rest.headers["content-range"] == f"bytes 1234-{size - 1}/{size}"
    beyond = await world.get(f"/v1/jobs/{job_id}/response", Range=f"bytes={size}-")
    assert beyond.status_code == 400

    world.key = await world.create_key("key_b2", STRANGER)
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/response"):
        response = await world.get(path)
        assert response.status_code == 404
        assert code(response) == "job_not_found"
    assert (
        await world.http.delete(f"/v1/jobs/{job_id}", headers=world.headers())
    ).status_code == 404
    assert world.matcher.cancels == []


async def test_a_delete_cancels_at_matcher_and_provider(world: World) -> None:
    job_id, sealed = envelope()
    await world.post(sealed)
    response = await world.http.delete(f"/v1/jobs/{job_id}", headers=world.headers())
    assert response.status_code == 202
    await until(lambda: world.matcher.cancels and world.provider.cancels)
    assert world.matcher.cancels[0].job_id == job_id


async def test_a_repeat_of_a_failed_job_says_so(world: World) -> None:
    job_id, sealed = envelope()
    await world.post(sealed)
    failed = JobFailed(
        job_id=job_id, account_id=ACCOUNT, reason="attempts_exhausted", released_nanoton=5
    )
    await append(world.matcher.appender, job_id, "fail", [failed])

    async def existing(request: JobRequest) -> None:
        await world.matcher.tell(request, "existing", req_hash=request.req_hash)

    world.matcher.on_request = existing
    response = await world.post(sealed)
    assert response.status_code == 503
    assert code(response) == "job_failed"
    assert (await world.get(f"/v1/jobs/{job_id}")).json()["failure"] == "attempts_exhausted"


def offer(
    name: str, price: int, context_tokens: int = 4096, model_id: str = "ab" * 32
) -> dict[str, Any]:
    return {
        "model_id": model_id, "name": name, "context_tokens": context_tokens,
        "input_nanoton_per_mtok": str(price), "cached_input_nanoton_per_mtok": "1",
        "output_nanoton_per_mtok": "9", "fee_bps": 500,
    }  # fmt: skip


async def test_the_directory_is_passed_on_in_one_piece_and_asked_for_once(world: World) -> None:
    attestation = await world.bus.connect("attestation")
    asked: list[DirectoryRequest] = []

    async def directory(message: Msg) -> None:
        request = DirectoryRequest.model_validate_json(message.data)
        asked.append(request)
        name, *terms = ("p2", 100, 640, "cd" * 32) if request.after else ("p1", 300, 4096)
        page = {
            "model": request.model, "policy": {"policy": {"network_id": "devnet"}},
            "log": {"shard0_position": 7, "hash": "00"},
            "providers": [{"provider_id": name, "tier": "simulated", "offer": offer("m", *terms)}],
            "next": "" if request.after else "p1",
        }  # fmt: skip
        await message.respond(Reply(ok=True, data=json.dumps(page)).to_canonical())

    await attestation.subscribe(subjects.DIRECTORY_REQUEST, cb=directory)
    await attestation.flush()
    answers = await asyncio.gather(*(world.get("/v1/directory?model=m") for _ in range(8)))
    assert {answer.text for answer in answers} == {answers[0].text}
    found = answers[0].json()
    assert [p["provider_id"] for p in found["providers"]] == ["p1", "p2"]
    assert found["log"] == {"shard0_position": 7, "hash": "00"}
    assert [(r.model, r.after) for r in asked] == [("m", ""), ("m", "p1")]
    assert (await world.get("/v1/directory")).status_code == 400

    models = (await world.get("/v1/models")).json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert model["id"] == "m"
    assert model["cocoon"]["tier"] == "simulated"
    assert model["cocoon"]["model_ids"] == {"ab" * 32: 1, "cd" * 32: 1}  # two manifests, one name
    assert model["cocoon"]["model_id"] == "cd" * 32  # as clients choose among equally many
    assert model["cocoon"]["context_tokens"] == 4096  # the largest that is offered
    assert model["cocoon"]["prices"]["input_nanoton_per_mtok"] == "100"
    assert (await world.http.get("/v1/models")).status_code == 401
    network = (await world.http.get("/v1/network")).json()
    assert network["network_id"] == "devnet"
    assert network["shards"] == {"network": 0, "accounts": [1]}


async def test_the_balance_comes_from_billing(world: World) -> None:
    billing = await world.bus.connect("billing")

    async def balance(message: Msg) -> None:
        account = BalanceRequest.model_validate_json(message.data).account_id
        told = {"account_id": account, "available_nanoton": "12", "held_nanoton": "3"}
        await message.respond(Reply(ok=True, data=json.dumps(told)).to_canonical())

    await billing.subscribe(subjects.billing(1, "balance"), cb=balance)
    await billing.flush()
    assert (await world.get("/v1/balance")).json() == {
        "account_id": ACCOUNT, "available_nanoton": "12", "held_nanoton": "3",
    }  # fmt: skip


async def test_absent_services_are_answered_with_503(world: World) -> None:
    for path in ("/v1/balance", "/v1/directory?model=m", "/v1/models"):
        response = await world.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"]


async def test_metrics_and_health_are_served_apart(world: World) -> None:
    await world.post(envelope()[1])
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.observe_port}") as observe:
        health = await observe.get("/healthz")
        assert health.json() == {"bus": True, "keys": True}
        text = (await observe.get("/metrics")).text
    assert "cocoon_first_byte_held_seconds_count" in text
    assert 'cocoon_http_requests_total{route="run_job",status="2xx"}' in text
    assert world.key not in text
    assert (await world.http.get("/metrics")).status_code == 401
