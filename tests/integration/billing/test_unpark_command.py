"""`cocoon unpark` as an operator uses it: a real billing, its bus and database, a command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from cocoon.bus.requests import ask
from cocoon.bus.service import Stop
from cocoon.contracts import events as e
from cocoon.contracts import subjects
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.messages import BalanceRequest
from cocoon.devnet.accounts import balance, open_account, shard_of
from cocoon.devnet.folder import DataFolder, RunningNetwork
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.kernel.errors import Unavailable
from services.billing import handlers
from services.billing import main as billing_main
from services.billing.settings import BillingSettings
from tests.support.job_world import hex16
from tests.support.network import LiveNetwork
from tests.support.servers import Bus, Database

ACCOUNT, STREAM = "acct_poor", f"job/{hex16('a')}"
SHARDS = (1, 2)
SHARD = shard_of(ACCOUNT, SHARDS)


@pytest.fixture
async def network(bus: Bus, database: Database, tmp_path: Path) -> AsyncIterator[LiveNetwork]:
    """A folder whose network is billing alone."""
    folder = DataFolder(tmp_path)
    folder.secrets.mkdir()
    shutil.copy(bus.seed_file("operator"), folder.seed("operator"))
    dsn = tmp_path / "dsn"
    dsn.write_text(database.dsn("cocoon_billing"), encoding="utf-8")
    settings = BillingSettings(
        nats_url=bus.server.url, nats_seed_file=bus.seed_file("billing"), postgres_dsn_file=dsn,
        account_shards=SHARDS,
    )  # fmt: skip
    stop = Stop()
    serving = asyncio.create_task(billing_main.serve(settings, stop))
    with folder.lock():
        folder.write_running(
            RunningNetwork(
                network_id="test", gateway_url="http://127.0.0.1:9", nats_url=bus.server.url,
                sidecar_url="http://127.0.0.1:9/v1", nats_monitor_url="http://127.0.0.1:9",
                observe_urls={}, account_id=ACCOUNT, shards=(0, *SHARDS),
            )
        )  # fmt: skip
        yield LiveNetwork(tmp_path)
    stop()
    await asyncio.wait_for(serving, 20)


async def cli(network: LiveNetwork, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(network.cli, *arguments)


async def status_says(network: LiveNetwork, text: str) -> str:
    async with asyncio.timeout(30):
        while text not in (said := (await cli(network, "status")).stdout):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return said


async def test_what_stands_aside_is_posted_once_its_cause_is_mended(
    network: LiveNetwork, bus: Bus, database: Database
) -> None:
    matcher = LogAppender(database.dsn("cocoon_matcher"), SHARD, "matcher")
    await matcher.acquire_term()
    held = e.FundsHeld(job_id=hex16("a"), account_id=ACCOUNT, amount_nanoton=500_000_000)
    item = AppendItem("c-1", b"{}", "test", STREAM, (), (NewEvent(STREAM, held),))
    assert isinstance(await matcher.append(item), Appended)
    await matcher.close()
    unpark = ("unpark", str(SHARD), STREAM)

    said = await status_says(network, f"PARKED {STREAM}")
    assert f"./cocoon {' '.join(unpark)} --data {network.data}\n" in said
    early = await cli(network, *unpark)
    assert (early.returncode, early.stdout) == (1, "")
    assert "still cannot be posted (negative_balance)" in early.stderr

    operator = await bus.connect("operator")
    await open_account(operator, ACCOUNT, SHARDS)
    funded = await cli(network, "fund", ACCOUNT, "2")
    assert (funded.returncode, funded.stdout) == (
        0, f"{ACCOUNT} was credited 2 TON; it has 2 TON free, 0 TON held by running jobs\n",
    )  # fmt: skip
    done = await cli(network, *unpark)
    assert (done.returncode, done.stdout) == (
        0, f"{STREAM}: 1 posted, nothing of it stands aside now\n",
    )  # fmt: skip
    assert "PARKED" not in (await cli(network, "status")).stdout
    found = await balance(operator, ACCOUNT, SHARDS)
    assert (found["available_nanoton"], found["held_nanoton"]) == ("1500000000", "500000000")

    again = await cli(network, *unpark, "--json")
    assert (again.returncode, again.stdout) == (
        0, f'{{"shard": {SHARD}, "stream": "{STREAM}", "events": 0}}\n',
    )  # fmt: skip
    nowhere = await cli(network, "unpark", "9", STREAM)
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("cocoon: there is no account shard 9")


async def _opened(operator: Client, account: str) -> None:
    """Billing may still be starting."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Unavailable):
                return await open_account(operator, account, SHARDS)
            await asyncio.sleep(0.05)


async def test_an_accounts_balance_is_told(network: LiveNetwork, bus: Bus) -> None:
    operator = await bus.connect("operator")
    for account in (ACCOUNT, "acct_other"):
        await _opened(operator, account)
    for amount in ("1", "0.5"):  # each answer has its own credit in it
        found = json.loads((await cli(network, "fund", "acct_other", amount, "--json")).stdout)
    assert found == {
        "account_id": "acct_other", "available_nanoton": "1500000000", "held_nanoton": "0",
    }  # fmt: skip
    first = await cli(network, "balance")
    assert (first.returncode, first.stdout) == (
        0, f"{ACCOUNT} has 0 TON free, 0 TON held by running jobs\n",
    )  # fmt: skip
    assert json.loads((await cli(network, "balance", "acct_other", "--json")).stdout) == found
    unknown = await cli(network, "balance", "acct_nope")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "cocoon: there is no account acct_nope\n"


async def test_a_balance_waits_for_the_ledger_and_not_for_ever(
    network: LiveNetwork, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "POSTED_TRIES", 2)
    operator = await bus.connect("operator")
    await _opened(operator, ACCOUNT)
    with pytest.raises(Unavailable, match="behind"):
        await ask(
            operator, subjects.billing(SHARD, "balance"),
            BalanceRequest(account_id=ACCOUNT, posted=1000),
        )  # fmt: skip
