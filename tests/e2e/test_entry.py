"""Providers that nobody configured: by TLS, by WebSocket, from behind a router that forgets."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from cocoon.bus import accounts, connection, keys, permissions
from cocoon.bus.sealed import get_sealed, put_sealed
from cocoon.contracts.messages import EnrolRequest
from cocoon.devnet.authority import DevAuthority
from cocoon.devnet.doors import EntryAddress
from cocoon.devnet.ports import free_port
from cocoon.kernel import ids
from cocoon.kernel.errors import ConfigurationError, Unavailable
from services.provider.entering import enter
from tests.support.asking import get
from tests.support.fault_proxy import lines
from tests.support.home import home, possible
from tests.support.network import ROOT, LiveNetwork

pytestmark = pytest.mark.network
MESSAGES: Any = [{"role": "user", "content": "Reverse: cocoon"}]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    """A network with doors to the outside, and two providers of its own."""
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    entry = f"127.0.0.1:{free_port()}"
    try:
        with LiveNetwork(folder / "data", ("--providers", "2", "--entry", entry)) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def stranger(
    network: LiveNetwork, bus: str, before: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A provider's agent that the network has never heard of: its id and its process."""
    folder = Path(tempfile.mkdtemp(prefix="cocoon-stranger-"))
    seed = keys.new_seed(secrets.token_bytes(32))
    keys.write_seed_file(folder / "identity.seed", seed)
    authority = DevAuthority.load(network.folder.authority)
    authority.platform(time.time_ns() // 1_000_000).save(folder / "platform.json")
    told = get(network, "/v1/network").json()["bus"]
    (folder / "ca.pem").write_text(told["ca_pem"])
    settings = {
        "NATS_URL": bus, "NATS_SEED_FILE": folder / "identity.seed",
        "NATS_CA_FILE": folder / "ca.pem", "DATA_DIR": folder / "data",
        "TRUST_FILE": network.folder.trust, "DEV_AUTHORITY_FILE": network.folder.authority,
        "DEV_PLATFORM_FILE": folder / "platform.json", "ENVIRONMENT": "dev",
    }  # fmt: skip
    (folder / "data").mkdir()
    log = (folder / "log").open("ab")
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "services.provider"], cwd=ROOT, stdout=log, stderr=log,
        env={**os.environ, **{f"COCOON_PROVIDER_{k}": str(v) for k, v in settings.items()}},
    )  # fmt: skip
    try:
        yield ids.provider_id(keys.raw_public(seed)), process
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def until_listed(network: LiveNetwork, provider: str, *, listed: bool = True) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        found = get(network, "/v1/directory?model=skills-1").json()["providers"]
        if (provider in {entry["provider_id"] for entry in found}) == listed:
            return
        assert time.monotonic() < deadline, f"{provider} was not listed in time"
        time.sleep(0.1)


def answer_by(network: LiveNetwork, provider: str) -> str:
    client = openai.OpenAI(base_url=network.sidecar, api_key="any", max_retries=0, timeout=30)
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            answer = client.chat.completions.with_raw_response.create(
                model="skills-1", messages=MESSAGES, extra_body={"provider": {"only": [provider]}}
            )
            break
        except openai.BadRequestError:  # the sidecar's own list is some seconds older
            assert time.monotonic() < deadline
            time.sleep(0.2)
    client.close()
    assert answer.headers["x-cocoon-provider"] == provider
    return str(answer.parse().choices[0].message.content)


@pytest.mark.parametrize("scheme", ["wss", "tls"])
def test_a_stranger_comes_in_from_outside_and_earns(network: LiveNetwork, scheme: str) -> None:
    urls = get(network, "/v1/network").json()["bus"]["urls"]
    (bus,) = [url for url in urls if url.startswith(f"{scheme}://")]
    with stranger(network, bus) as (provider, _):
        until_listed(network, provider)
        assert answer_by(network, provider) == "noococ"
    until_listed(network, provider, listed=False)


@pytest.mark.parametrize("scheme", ["wss", "tls"])
async def test_large_ciphertext_goes_both_ways(
    network: LiveNetwork, scheme: str, tmp_path: Path
) -> None:
    seed = keys.new_seed(secrets.token_bytes(32))
    keys.write_seed_file(tmp_path / "seed", seed)
    provider = ids.provider_id(keys.raw_public(seed))
    told = get(network, "/v1/network").json()["bus"]
    urls = [url for url in told["urls"] if url.startswith(scheme)]
    assert told["ca_pem"] == network.folder.bus_ca.read_text()
    nc = await connection.connect(
        urls, tmp_path / "seed", "x", permissions.inbox_prefix(provider),
        ca_file=network.folder.bus_ca,
    )  # fmt: skip
    try:
        await enter(nc, provider, EnrolRequest(identity_key=keys.raw_public(seed).hex()))
        whole = secrets.token_bytes(3 * 1024 * 1024 + 7)
        digest = await put_sealed(nc.jetstream(), provider, whole)
        assert await get_sealed(nc, provider, digest) == whole
        await nc.reconnect(10)
        assert await get_sealed(nc, provider, digest) == whole
    finally:
        await connection.close(nc)


@pytest.mark.skipif(not possible(), reason="no network namespaces here: needs root and `ip`")
def test_a_provider_at_home_comes_back_after_its_router_forgot_its_line() -> None:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-e2e-"))
    with home() as place:
        entry = EntryAddress(place.router, free_port())
        options = ("--entry", f"{entry.host}:{entry.port}")
        with (
            LiveNetwork(folder / "data", options) as network,
            lines(lambda: (entry.host, entry.port), host=place.router) as (router,),
        ):
            bus = f"wss://{place.router}:{router.port}"
            with stranger(network, bus, place.command()) as (provider, _):
                until_listed(network, provider)
                assert answer_by(network, provider) == "noococ"
                router.tell(lambda proxy: proxy.half_open("up", "down"))  # no end is told to anyone
                until_listed(network, provider, listed=False)
                until_listed(network, provider)
                assert answer_by(network, provider) == "noococ"
                assert router.tell(lambda proxy: proxy.swallowed) > 0
    shutil.rmtree(folder, ignore_errors=True)


async def test_a_wrong_authority_and_a_wrong_address_are_said_plainly(
    network: LiveNetwork, tmp_path: Path
) -> None:
    keys.write_seed_file(tmp_path / "seed", keys.new_seed(secrets.token_bytes(32)))
    for url in get(network, "/v1/network").json()["bus"]["urls"]:
        with pytest.raises(ConfigurationError, match="certificate that is not trusted"):
            await connection.connect(url, tmp_path / "seed", "x", "_INBOX_x", timeout_s=30)
        closed = url.rpartition(":")[0] + f":{free_port()}"
        with pytest.raises(Unavailable, match="is the address right"):
            await connection.connect(
                closed, tmp_path / "seed", "x", "_INBOX_x", timeout_s=2,
                ca_file=network.folder.bus_ca,
            )  # fmt: skip
    for nonsense in ("http://127.0.0.1:1", "127.0.0.1:4222", "", "wss://a:1,tls://a:2"):
        with pytest.raises(ConfigurationError, match="address"):
            await connection.connect(nonsense, tmp_path / "seed", "x", "_INBOX_x")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        await connection.connect(
            "wss://127.0.0.1:1", tmp_path / "seed", "x", "_INBOX_x", ca_file=tmp_path / "none"
        )


async def test_lines_that_the_server_ends_under_load_cost_no_job(network: LiveNetwork) -> None:
    """As when logins run out: every provider's, again and again."""
    prefix = permissions.inbox_prefix("entry")
    entry = await connection.connect(
        network.running.nats_url, network.folder.seed("entry"), "test", prefix
    )
    client = openai.AsyncOpenAI(base_url=network.sidecar, api_key="any", max_retries=0, timeout=60)
    ended = 0

    async def end_lines() -> None:
        nonlocal ended
        while True:
            for number in (1, 2):
                subject = f"$SYS.REQ.ACCOUNT.{accounts.berth(number)}.CONNZ"
                found = json.loads((await entry.request(subject, b"", timeout=2)).data)
                for line in found["data"]["connections"]:
                    kick = f"$SYS.REQ.SERVER.{found['server']['id']}.KICK"
                    await entry.request(kick, json.dumps({"cid": line["cid"]}).encode(), timeout=2)
                    ended += 1
                await asyncio.sleep(1.0)

    ending = asyncio.create_task(end_lines())
    try:
        for _ in range(6):
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="skills-1", messages=MESSAGES)
                  for _ in range(8))
            )  # fmt: skip
            assert {a.choices[0].message.content for a in answers} == {"noococ"}
            await asyncio.sleep(0.5)
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        await connection.close(entry)
        await client.close()
    assert ended >= 2
