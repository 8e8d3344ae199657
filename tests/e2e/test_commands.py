"""The operator's commands on a running network, as a person and as a program use them."""
# ruff: noqa: S608 - forgeries are made of constants

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from cocoon.cli.app import app
from cocoon.kernel.errors import BadRequest
from tests.support.asking import ask, get, quiet_balance, sql, wait_ended
from tests.support.extra_processes import Connected
from tests.support.network import LiveNetwork
from tests.support.ways import Way


def test_a_key_is_made_listed_used_and_revoked_at_once(
    network: LiveNetwork, keyless: Connected
) -> None:
    account = network.running.account_id
    made = network.cli("keys", "create", "--name", "laptop", "--account", account)
    found = re.search(r"ck_[\w-]{43}", made.stdout)
    key_id = re.search(r"key_[0-9a-f]+", made.stdout)
    assert made.returncode == 0
    assert found is not None
    assert key_id is not None
    assert "api_key at the sidecar" in made.stdout
    assert f"./cocoon connect --gateway {network.gateway} --key KEY --trust" in made.stdout
    listed = network.cli("keys", "list").stdout
    at = r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.search(r"\AKEY +ACCOUNT +MADE +REVOKED +NAME\n", listed)
    assert re.search(rf"{key_id[0]}  {account}  {at}  - +laptop", listed)
    assert found[0] not in listed
    with openai.OpenAI(base_url=keyless.base_url, api_key=found[0], max_retries=0) as client:
        answer = client.chat.completions.create(**ask("Reverse: cocoon"))
        assert answer.choices[0].message.content == "noococ"
        revoked = network.cli("keys", "revoke", key_id[0])
        assert (revoked.returncode, revoked.stdout) == (0, f"{key_id[0]} is revoked\n")
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**ask("Reverse: cocoon"))
        assert get(network, "/v1/balance", found[0]).status_code == 401
    assert re.search(
        rf"{key_id[0]}  {account}  {at}  {at}  laptop", network.cli("keys", "list").stdout
    )
    again = network.cli("keys", "revoke", key_id[0])
    assert again.returncode == 0
    assert re.fullmatch(rf"{key_id[0]} was revoked already, at {at}\n", again.stdout)
    told = json.loads(network.cli("keys", "list", "--json").stdout)["keys"]
    told_key = next(k for k in told if k["api_key_id"] == key_id[0])
    assert told_key["created_ms"] <= told_key["revoked_ms"]
    assert get(network, "/v1/balance").status_code == 200
    assert "fund" not in made.stdout
    nobody = network.cli("keys", "create", "--account", "acct_nope")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("cocoon: there is no account acct_nope")
    unknown = network.cli("keys", "revoke", "key_000000000000")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("cocoon: ")


def test_funding_twice_with_one_reference_is_one_credit(network: LiveNetwork) -> None:
    account = json.loads(network.cli("keys", "create", "--json").stdout)["account_id"]
    fund = ("fund", account, "0.25", "--reference", "invoice-1")
    now = "it has 0.25 TON free, 0 TON held by running jobs\n"
    assert network.cli(*fund).stdout == f"{account} was credited 0.25 TON; {now}"
    assert network.cli(*fund).stdout.endswith(f"nothing changed; {now}")
    done = network.cli("fund", account, "1", "--reference", "invoice-1")
    assert (done.returncode, done.stdout) == (1, ""), "another amount under a used reference"
    assert "another amount" in done.stderr
    wrong = network.cli("fund", "not an account", "1")
    assert (wrong.returncode, wrong.stdout) == (64, "")
    assert wrong.stderr == "cocoon: this value cannot be used: account_id\n"
    found = json.loads(network.cli("fund", account, "1", "--json").stdout)
    assert (found["account_id"], found["available_nanoton"]) == (account, "1250000000")
    assert json.loads(network.cli("balance", account, "--json").stdout) == found


@pytest.mark.parametrize("amount", ["0", "-1", "x", "1e400", "0.0000000001", "9999999999999"])
def test_an_amount_that_is_none_is_refused_in_a_sentence(amount: str) -> None:
    done = CliRunner().invoke(app, ["fund", "acct_1", "--", amount])
    assert isinstance(done.exception, BadRequest)
    assert done.exception.message


def test_status_says_what_runs_to_people_and_programs(network: LiveNetwork, sidecar: Way) -> None:
    sidecar.complete(**ask("Hello"))
    money = quiet_balance(network)
    text = network.cli("status")
    assert text.returncode == 0
    assert "DOWN" not in text.stdout
    for name in (
        "attestation", "billing", "matcher", "gateway", "provider", "sidecar", "nats", "postgres",
    ):  # fmt: skip
        assert re.search(rf"  {name} +up\n", text.stdout)
    told = json.loads(network.cli("status", "--json").stdout)
    assert set(told["services"].values()) == {True}
    assert told["account"]["available_nanoton"] == str(money)
    assert [p["models"] for p in told["providers"]] == [["skills-1"]]
    heads = {str(shard): n for shard, n in sql(network, "SELECT shard, position FROM log.head")}
    assert told["streams"] == heads


def test_commands_without_a_network_say_so(network: LiveNetwork) -> None:
    nowhere = network.data.with_name("nowhere")
    for command in (("status",), ("keys", "list"), ("replay", "--verify")):
        done = LiveNetwork(nowhere).cli(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"cocoon: no network runs from {nowhere}")
    assert not nowhere.exists()


def test_replay_agrees_and_finds_a_forged_balance(network: LiveNetwork, sidecar: Way) -> None:
    answer = sidecar.complete(**ask("Reverse: cocoon"))
    wait_ended(network, answer.id.removeprefix("chatcmpl-"))
    equal = network.cli("replay", "--verify", "--decisions")
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert equal.stdout.endswith("equal\n")
    for shards, said in (("9", "there is no shard 9; this network has 0, 1"), ("x", "--shards")):
        wrong = network.cli("replay", "--shards", shards)
        assert (wrong.returncode, wrong.stdout) == (64, "")
        assert said in wrong.stderr
    account = f"client:{network.running.account_id}"
    row = f"shard = 1 AND account = '{account}'"
    try:
        sql(network, f"UPDATE ledger.balances SET amount = amount + 1 WHERE {row}")
        forged = network.cli("replay", "--verify")
    finally:
        sql(network, f"UPDATE ledger.balances SET amount = amount - 1 WHERE {row}")
    assert forged.returncode == 1, forged.stdout + forged.stderr
    assert account in forged.stdout
    assert re.search(r"last touched at positions [0-9, ]*\d", forged.stdout)


@pytest.mark.parametrize("column", ["data", "hash"])
def test_replay_finds_a_forged_event(network: LiveNetwork, column: str) -> None:
    where = "shard = 1 AND position = 2"
    value = {"data": "replace(data, 'acct', 'bcct')", "hash": "sha256(hash)"}[column]
    old = sql(network, f"SELECT {column} FROM log.events WHERE {where}")[0][0]
    kept = f"'\\x{old.hex()}'" if isinstance(old, bytes) else f"'{old}'"
    off = "SET LOCAL session_replication_role = replica"
    try:
        sql(network, off, f"UPDATE log.events SET {column} = {value} WHERE {where}")
        assert sql(network, f"SELECT {column} FROM log.events WHERE {where}")[0][0] != old
        forged = network.cli("replay", "--verify")
    finally:
        sql(network, off, f"UPDATE log.events SET {column} = {kept} WHERE {where}")
    assert sql(network, f"SELECT {column} FROM log.events WHERE {where}")[0][0] == old
    assert forged.returncode == 2, forged.stdout + forged.stderr
    assert "Traceback" not in forged.stderr
    assert "position 2" in forged.stdout + forged.stderr


def test_replay_agrees_again_once_the_forgeries_are_undone(network: LiveNetwork) -> None:
    quiet_balance(network)
    done = network.cli("replay", "--verify", "--json")
    assert done.returncode == 0
    assert [report["differences"] for report in json.loads(done.stdout)] == [[], []]


def test_an_exported_log_is_verified_without_its_network(
    network: LiveNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "log.gz"
    exported = network.cli("replay", "--export", str(file))
    assert exported.returncode == 0, exported.stdout + exported.stderr
    nowhere = LiveNetwork(network.data.with_name("nowhere"))
    verified = nowhere.cli("replay", "--file", str(file), "--decisions", "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    for report in json.loads(verified.stdout):
        assert f"the last one's hash is {report['head_hash']}" in exported.stdout
    assert nowhere.cli("replay", "--file", str(tmp_path)).returncode == 64


def test_no_service_may_write_the_log_itself(network: LiveNetwork) -> None:
    """The forgeries above needed the superuser: a service's own login may not do them."""
    import asyncio

    import asyncpg

    async def forge(role: str, statement: str) -> None:
        connection = await asyncpg.connect(network.folder.dsn(role).read_text(), timeout=10)
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
        finally:
            await connection.close(timeout=10)

    for role in ("gateway", "matcher", "billing", "attestation", "reader"):
        for statement in (
            "UPDATE log.events SET data = '{}'",
            "DELETE FROM log.events",
            "UPDATE log.head SET position = 0",
            "TRUNCATE ledger.entries",
        ):
            asyncio.run(forge(role, statement))


def test_the_network_and_directory_are_public_and_the_rest_is_not(network: LiveNetwork) -> None:
    assert httpx.get(f"{network.gateway}/v1/network", trust_env=False).json()["network_id"]
    for path in ("/v1/models", "/v1/balance", "/v1/jobs/" + "0" * 32, "/x"):
        assert httpx.get(f"{network.gateway}{path}", trust_env=False).status_code == 401
    at_door = httpx.get(f"{network.gateway}/", trust_env=False)
    assert at_door.status_code == 404
    assert "./cocoon connect" in at_door.json()["error"]["message"]
