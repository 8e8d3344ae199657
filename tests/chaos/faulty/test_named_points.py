"""kill -9 at named points of every service: of itself, of NATS, of Postgres, in the middle of jobs.

The points and the wrapper that finds them are in tests/support/named_points.py. One network takes
all of them, one after the other, COCOON_FAULT_TRIALS times. They are judged once a service.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.support.chaos_world import Trial, trials, wait_for
from tests.support.client_load import ClientLoad
from tests.support.faulty_network import FaultyNetwork
from tests.support.lines_of import LinedWorld
from tests.support.named_points import SELF

pytestmark = pytest.mark.network
OF_LOG = ("before the transaction", "within the transaction", "after the commit")
PROVIDER = "provider-1"
POINTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gateway": {
        SELF: ("before the matcher is asked", "after the matcher is asked", "after the commit",
               "before the answer's end"),
        "nats": ("after the matcher is asked", "after the commit"),
        "postgres": ("after the matcher is asked",),
    },
    "matcher": {
        SELF: (*OF_LOG, "after publishing matched", "after publishing committed"),
        "nats": ("after publishing matched", "after the commit"),
        "postgres": OF_LOG,
    },
    "billing": {
        SELF: (*OF_LOG, "after publishing the ack", "before the queue's ack",
               "within the ledger's transaction", "after the ledger's commit",
               "after the relay's publish"),
        "nats": ("after the commit", "before the queue's ack", "after the relay's publish"),
        "postgres": (*OF_LOG, "within the ledger's transaction"),
    },
    "attestation": {
        SELF: (*OF_LOG, "before the reply"),
        "nats": ("before the reply",),
        "postgres": OF_LOG,
    },
    PROVIDER: {
        SELF: ("before it accepts", "after its first frame", "before the spool", "after the spool",
               "after its last frame", "after SEALED has it", "after INGRESS has it",
               "before its ack is taken"),
        "nats": ("after the spool", "after its last frame", "after INGRESS has it"),
    },
}  # fmt: skip
# Left to the long run: what another point, or the same one of another service, tries as well.
LONG_RUN = {
    ("attestation", SELF): OF_LOG,
    ("attestation", "nats"): ("before the reply",),
    ("attestation", "postgres"): OF_LOG,
    ("billing", SELF): (*OF_LOG[:2], "after publishing the ack", "after the ledger's commit"),
    ("billing", "nats"): ("after the commit", "before the queue's ack"),
    ("billing", "postgres"): OF_LOG,
    ("gateway", "nats"): ("after the commit",),
    ("gateway", "postgres"): ("after the matcher is asked",),
    ("matcher", SELF): OF_LOG[:2],
    ("matcher", "nats"): ("after the commit",),
    ("matcher", "postgres"): (OF_LOG[0], OF_LOG[2]),
    (PROVIDER, SELF): ("before the spool", "after SEALED has it"),
    (PROVIDER, "nats"): ("after the spool", "after INGRESS has it"),
}
ANSWERS = 2  # from requests that began after the fault


def points_of(name: str) -> list[tuple[str, str]]:
    """(victim, point) to be tried now."""
    return [
        (victim, point)
        for victim, points in POINTS[name].items()
        for point in points
        if trials() > 1 or point not in LONG_RUN.get((name, victim), ())
    ]


@pytest.mark.timeout(120 + 400 * (trials() - 1))
@pytest.mark.parametrize("name", POINTS)
async def test_a_kill_at_a_named_point_breaks_no_invariant(world: LinedWorld, name: str) -> None:
    points = points_of(name)
    for _ in range(trials()):
        began_s = time.monotonic()
        async with world.load() as load:
            tried = [await kill_at(world, load, name, point, victim) for victim, point in points]
        for trial in tried[:-1]:
            trial.note()  # how long each took; what all did is told by the one that is judged
        await world.judge(tried[-1], since_s=began_s)
        assert tried[-1].violations == []


async def kill_at(world: LinedWorld, load: ClientLoad, name: str, point: str, victim: str) -> Trial:
    """Arm one point under load, and go on until later requests are answered."""
    network = world.network
    killed = name if victim == SELF else victim
    trial = Trial(f"{name} {point}: kill -9 {victim}")
    old_pid = network.pid(killed)
    network.arm(name, point, victim)
    await until_fired(network, load, name, point)
    trial.at_s = time.monotonic() - (network.fired_s(name) or 0.0)
    await asyncio.to_thread(network.wait_restarted, killed, old_pid)
    trial.restarted_s = time.monotonic() - trial.at_s
    await load.answered(ANSWERS, trial.at_s, 40)
    trial.answered_s = min(call.ended_s for call in load.ok(trial.at_s)) - trial.at_s
    return trial


async def until_fired(network: FaultyNetwork, load: ClientLoad, name: str, point: str) -> None:
    if name == "attestation":  # it decides about providers: one that begins anew asks for more
        await asyncio.to_thread(network.kill, "provider-2")
    await load.until(lambda: network.fired_s(name) is not None, f"{name} {point}", 30)


async def test_a_point_that_was_passed_kills_only_once(world: LinedWorld) -> None:
    network = world.network
    async with world.load(2) as load:
        network.arm("matcher", "after the commit", on=3)
        old_pid = network.pid("matcher")
        await until_fired(network, load, "matcher", "after the commit")
        await asyncio.to_thread(network.wait_restarted, "matcher", old_pid)
        pid = network.pid("matcher")
        await load.answered(8, time.monotonic())
    assert network.pid("matcher") == pid
    await wait_for(lambda: network.fired_s("matcher") is not None, "the mark")
