"""A word that only the client and the enclave may know: nothing at rest or in traces holds it.

The search is tried on words planted where content would lie if it leaked.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Iterator

import asyncpg
import httpx
import openai
import pytest

from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.sealed import put_sealed
from cocoon.client import NetworkOptions
from cocoon.kernel.ids import provider_id
from tests.support.asking import ENDLESS, MODEL, ask, sql, superuser_dsn, wait_ended
from tests.support.canaries import files_under, find_canaries
from tests.support.extra_processes import Connected
from tests.support.network import LiveNetwork
from tests.support.otlp_collector import Collector
from tests.support.ways import Way, way

# the tiny model repeats plain words well; the answer itself must hold the word
CANARY = "purple wombats sing"


def places(network: LiveNetwork, collector: Collector) -> list[tuple[str, bytes]]:
    """Everything that the network keeps or has said, with a dump of every table."""
    sql_checkpoint(network)
    return [
        *files_under(network.data.parent),
        *dump(network),
        *((f"trace {n}", body) for n, body in enumerate(collector.bodies)),
    ]


def sql_checkpoint(network: LiveNetwork) -> None:
    """Postgres writes what it still holds in memory."""

    async def run() -> None:
        connection = await asyncpg.connect(superuser_dsn(network), timeout=10)
        try:
            await connection.execute("CHECKPOINT")
        finally:
            await connection.close(timeout=10)

    asyncio.run(run())


def dump(network: LiveNetwork) -> Iterator[tuple[str, bytes]]:
    tables = sql(
        network,
        "SELECT schemaname, tablename FROM pg_tables"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    )
    assert len(tables) > 10
    for schema, table in tables:
        rows = sql(network, f'SELECT t::text FROM "{schema}"."{table}" t')  # noqa: S608
        yield f"table {schema}.{table}", "\n".join(str(row[0]) for row in rows).encode()
    rows = sql(network, "SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    yield "table pg_stat_activity", "\n".join(str(row[0]) for row in rows).encode()


def speak(network: LiveNetwork, client: Way) -> None:
    """The canary in prompts, in answers and in everything that goes wrong."""
    said = client.complete(**ask(f"Repeat: {CANARY}"))
    assert said.choices[0].message.content == CANARY
    chunks = client.stream(**ask(f"Uppercase: {CANARY}"))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == CANARY.upper()
    wait_ended(network, said.id.removeprefix("chatcmpl-"))
    key = {"Idempotency-Key": f"{CANARY.replace(' ', '-')}-{secrets.token_hex(4)}"}
    client.complete(
        **ask(CANARY), user=CANARY, metadata={"note": CANARY}, stop=[CANARY],
        safety_identifier=CANARY, extra_headers=key,
    )  # fmt: skip
    for wrong in (
        {"extra_body": {CANARY: CANARY}},
        {"model": CANARY},
        {"temperature": CANARY},
        {"response_format": {"type": CANARY}},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY * 200}]},
    ):
        with pytest.raises(openai.APIStatusError):
            client.complete(**{**ask(CANARY), **wrong})
    long = {**ENDLESS, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 400}
    if isinstance(client.client, openai.OpenAI):
        with client.client.chat.completions.create(**long, stream=True) as stream:
            next(iter(stream))


def speak_raw(network: LiveNetwork, keyless: Connected) -> None:
    """Straight at both doors, with and without a key, malformed too."""
    slug = CANARY.replace(" ", "-")
    body = {"model": MODEL, "messages": [{"role": "user", "content": CANARY}]}
    for base in (network.gateway + "/v1", network.sidecar, keyless.base_url):
        for path in ("chat/completions", "responses", slug, f"models/{slug}"):
            for key in (network.api_key, f"ck_{slug}"):
                headers = {"Authorization": f"Bearer {key}", "x-note": slug}
                httpx.post(f"{base}/{path}", json=body, headers=headers, trust_env=False)
                httpx.get(f"{base}/{path}?q={slug}", headers=headers, trust_env=False)
        httpx.post(f"{base}/chat/completions", content=b"{" + CANARY.encode(), trust_env=False)
    httpx.post(
        f"{network.gateway}/v1/jobs", content=CANARY.encode(), trust_env=False,
        headers={
            "Authorization": f"Bearer {network.api_key}", "traceparent": slug,
            "content-type": "application/vnd.cocoon.cai1", "idempotency-key": slug,
        },
    )  # fmt: skip
    with httpx.stream(
        "POST", f"{network.sidecar}/chat/completions", trust_env=False,
        json={**ENDLESS, **body, "max_tokens": 600, "stream": True},
    ) as stream:  # fmt: skip
        next(stream.iter_raw())


def test_no_word_of_a_conversation_is_anywhere(
    network: LiveNetwork,
    collector: Collector,
    options: NetworkOptions,
    sidecar: Way,
    keyless: Connected,
) -> None:
    with way("sync in-process", "", options) as inside:
        for client in (sidecar, inside):
            speak(network, client)
    speak_raw(network, keyless)
    last = sidecar.complete(**ask(f"Repeat: {CANARY}"))
    wait_ended(network, last.id.removeprefix("chatcmpl-"))
    collector.wait(lambda: False, timeout_s=1.5)
    words = [
        CANARY.encode(),
        CANARY.upper().encode(),
        CANARY.replace(" ", "-").encode(),
        CANARY[::-1].encode(),
        json.dumps([ord(c) for c in CANARY])[1:-1].encode(),  # as token ids
    ]
    assert find_canaries(places(network, collector), words) == []


def test_the_search_finds_what_is_planted(network: LiveNetwork, collector: Collector) -> None:
    planted = secrets.token_hex(12)
    network.cli("keys", "create", "--name", planted)  # a label is kept on purpose
    asyncio.run(_plant_in_jetstream(network, planted.encode()))
    encoded = base64.b64encode(f'{{"a": "{planted}"}}'.encode())
    (network.folder.root / "provider" / "spool" / "planted").write_bytes(encoded)
    (network.folder.logs / "planted.txt").write_text(planted.encode().hex())
    try:
        found = find_canaries(places(network, collector), [planted.encode()])
    finally:
        (network.folder.root / "provider" / "spool" / "planted").unlink()
        (network.folder.logs / "planted.txt").unlink()
    for place in (
        "table gateway.api_keys", "/pg_wal/", "/base/", "/jetstream/", "/spool/planted",
        "/logs/planted.txt",
    ):  # fmt: skip
        assert any(place in name for name in found), (place, found)


async def _plant_in_jetstream(network: LiveNetwork, word: bytes) -> None:
    seed = network.folder.seed("provider")
    name = provider_id(raw_public(read_seed_file(seed)))
    nc = await connect(network.running.nats_url, seed, "planting", inbox_prefix(name))
    try:
        await put_sealed(nc.jetstream(), name, b"as if " + word)
    finally:
        await close(nc)
