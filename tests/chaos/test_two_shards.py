"""Two account shards, the network shard, and a small provider that both of them use."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.invariants import check_all
from tests.support.collected import Evidence
from tests.support.evidence import collect, drained
from tests.support.network import LiveNetwork
from tests.support.two_shards import (
    TwoShards,
    customer,
    meetings,
    most_at_once,
    offered,
    spells,
    two_shards,
    watched,
)

pytestmark = pytest.mark.network
CONCURRENCY = 2
CALLERS = {1: 6, 2: 2}  # four times what the provider takes, most of it one shard's
ANSWERS = 12
STOPPED_S = 4.0  # longer than a gateway waits for a matcher, and than a provider may be silent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoShards]:
    options = ("--shards", "2", "--concurrency", str(CONCURRENCY))
    canary = "".join(secrets.choice("bcdfghjklmnpqrstvwxz") for _ in range(12))
    with (
        LiveNetwork(tmp_path_factory.mktemp("shards") / "network", options) as network,
        two_shards(network, canary) as found,
    ):
        for shard in (1, 2):
            found.customers[shard] = asyncio.run(customer(network, shard))
        yield found


async def judged(world: TwoShards) -> Evidence:
    """Wait until all is done; the sixteen invariants hold over all shards, and no provider ran
    more than it offers."""
    await drained(world.network)
    evidence = await collect(world.network, world.calls(), (world.canary.encode(),))
    assert set(evidence.logs) == {0, 1, 2}
    assert set(evidence.ledgers or {}) == {1, 2}
    assert check_all(evidence) == []
    bound = offered(evidence)
    most = most_at_once(spells(evidence))
    assert all(most[provider] <= bound[provider] for provider in most)
    return evidence


async def test_a_provider_of_two_shards_is_full_and_never_over_committed(world: TwoShards) -> None:
    async with (
        watched(world.network, "provider") as seen,
        world.load(1, CALLERS[1]) as one,
        world.load(2, CALLERS[2]) as two,
    ):
        await asyncio.gather(one.answered(ANSWERS), two.answered(ANSWERS))
    assert max(seen) == CONCURRENCY

    evidence = await judged(world)
    ran = spells(evidence)
    assert {spell.shard for spell in ran} == {1, 2}
    assert list(most_at_once(ran).values()) == [CONCURRENCY]  # the bound was reached
    assert meetings(ran)  # by jobs of both shards at once
    for who in world.customers.values():
        assert [c for c in who.history if c.outcome != "ok"] == []
    events = Counter(
        type(event).__name__ for rows in evidence.decoded.values() for _, event in rows
    )
    told = {name: events[name] for name in ("PaymentSettled", "ProviderMatched", "LeaseExpired")}
    print(json.dumps({"looks": len(seen), "meetings": meetings(ran), **told}))


async def test_a_frozen_matcher_leaves_the_other_shard_serving(world: TwoShards) -> None:
    network = world.network
    async with world.load(1, 2) as one, world.load(2, 2) as two:
        begun_s = time.monotonic()
        await asyncio.gather(one.answered(2, begun_s), two.answered(2, begun_s))
        network.send("matcher-2", signal.SIGSTOP)
        try:
            stopped_s = time.monotonic()
            await asyncio.sleep(STOPPED_S)
            served = one.ok(stopped_s)
        finally:
            network.send("matcher-2", signal.SIGCONT)
            going_s = time.monotonic()
        await two.answered(3, going_s)
        recovered_s = min(c.ended_s for c in two.ok(going_s)) - going_s

    assert len(served) >= 3
    assert [c for c in one.history if c.outcome != "ok"] == []
    await judged(world)
    told = Counter(f"{c.status} {c.code}" for c in two.history if c.outcome != "ok")
    print(json.dumps({"served": len(served), "recovered_s": round(recovered_s, 2), "told": told}))


async def test_a_killed_matcher_leaves_the_other_shard_serving(world: TwoShards) -> None:
    network = world.network
    async with world.load(1, 2) as one, world.load(2, 2) as two:
        begun_s = time.monotonic()
        await asyncio.gather(one.answered(2, begun_s), two.answered(2, begun_s))
        old_pid, killed_s = network.pid("matcher"), time.monotonic()
        await asyncio.to_thread(network.kill, "matcher")
        await asyncio.to_thread(network.wait_restarted, "matcher", old_pid)
        await asyncio.gather(one.answered(3, killed_s), two.answered(3, killed_s))

    assert [c for c in two.history if c.outcome != "ok" and c.began_s >= begun_s] == []
    await judged(world)


def test_every_command_works_across_the_shards(world: TwoShards) -> None:
    network, second = world.network, world.customers[2]
    replayed = network.cli("replay", "--verify", "--decisions", "--json")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    status = json.loads(network.cli("status", "--json").stdout)
    assert set(status["streams"]) == {"0", "1", "2"}
    assert status["services"]["matcher"]
    assert status["services"]["matcher-2"]
    before = json.loads(network.cli("fund", second.account_id, "1", "--json").stdout)
    after = json.loads(network.cli("fund", second.account_id, "1", "--json").stdout)
    gained = int(after["available_nanoton"]) - int(before["available_nanoton"])
    assert gained == 10**9
    key = json.loads(network.cli("keys", "create", "--account", second.account_id, "--json").stdout)
    assert key["account_id"] == second.account_id


def test_the_same_folder_goes_on_with_its_shards_and_no_other_number(world: TwoShards) -> None:
    network = world.network
    network.stop()
    refused = network.cli("up", "--shards", "1", "--json")
    assert refused.returncode == 1
    assert "was made with --shards 2" in refused.stderr

    network.options = ()
    network.start()

    assert network.running.shards == (0, 1, 2)
    replayed = network.cli("replay", "--verify", "--decisions")
    assert replayed.returncode == 0, replayed.stdout
