"""Canaries' judgements over real NATS and Postgres: recorded, decided, revoked, lifted."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from cocoon.contracts.commands import decode_command
from cocoon.contracts.messages import BanRequest, CanaryRequest
from cocoon.domain import decide as domain
from cocoon.domain.honesty import make_rule
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.honesty import standings
from cocoon.eventlog.read import read_batch, read_commands
from cocoon.kernel.errors import CocoonError, NotFound, Unavailable
from tests.support.attestation_world import MODEL_ID, OTHER_MODEL_ID, Network, Provider
from tests.support.servers import Bus, Database

RULE = make_rule(
    tolerance_bps=1000, honest_ppm=10_000, cheating_ppm=100_000, false_alarm_ppm=100,
    miss_ppm=10_000,
)  # fmt: skip


@pytest.fixture
def network(bus: Bus, database: Database, tmp_path: Path) -> Network:
    return Network(bus, database, tmp_path)


def judged(provider: Provider, outcome: str, job: str, **changes: Any) -> CanaryRequest:
    fields: dict[str, Any] = {
        "provider_id": provider.provider_id, "model_id": MODEL_ID, "outcome": outcome,
        "job_id": hashlib.sha256(job.encode()).hexdigest()[:32], "distance_bps": 5000,
        "rule": RULE, **changes,
    }  # fmt: skip
    return CanaryRequest(**fields)


async def tell(network: Network, provider: Provider, *outcomes: str, begin: str = "job") -> Any:
    for at, outcome in enumerate(outcomes):
        said = await network.platform_ask("canary", judged(provider, outcome, f"{begin}{at}"))
    return said


async def test_who_fails_the_test_is_revoked_refused_and_told_until_it_is_lifted(
    network: Network,
) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        said = await tell(network, provider, "differed", "differed", "passed", "differed")
        assert (said["verdict"], said["judged"], said["differed"]) == ("open", 4, 3)
        said = await tell(network, provider, "differed", "differed", begin="more")
        assert (said["verdict"], said["revoked"]) == ("dishonest", 1)
        with pytest.raises(CocoonError) as attests:
            await provider.attest()
    async with network.running():
        with pytest.raises(CocoonError) as restarted:
            await provider.challenge()
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id, lift=True))
        await provider.attest()
        said = await tell(network, provider, "differed", "differed", "differed", begin="new")
        assert (said["verdict"], said["judged"]) == ("open", 3)
    assert {e.value.code for e in (attests, restarted)} == {"canary"}
    assert "Audit jobs found" in attests.value.message
    types = await network.types()
    assert types.count("CanaryJudged") == 9
    assert types[types.index("HonestyDecided") + 1] == "AttestationRevoked"
    assert types.count("HonestyLifted") == 1
    reasons = [data.reason for kind, data in await network.events() if kind == "AttestationRevoked"]
    assert reasons == ["canary"]


async def test_an_honest_provider_beside_it_stays(network: Network) -> None:
    async with network.running():
        cheat = await (await Provider.connect(network)).admitted()
        honest = await (await Provider.connect(network, 1)).admitted()
        await tell(network, honest, "passed", "differed", "unclear", "passed", begin="honest")
        await tell(network, cheat, *["differed"] * 4)
        await honest.challenge()
        with pytest.raises(CocoonError):
            await cheat.challenge()


async def test_a_job_is_judged_once_and_models_apart(network: Network) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        for outcome in ("differed", "differed", "passed"):
            said = await network.platform_ask("canary", judged(provider, outcome, "one"))
            assert said["judged"] == 1
        for job in ("two", "three", "four"):
            other = judged(provider, "differed", job, model_id=OTHER_MODEL_ID)
            said = await network.platform_ask("canary", other)
        assert (said["verdict"], said["judged"]) == ("open", 3)
        stranger = judged(provider, "passed", "x", provider_id="prov_" + "0" * 32)
        with pytest.raises(NotFound):
            await network.platform_ask("canary", stranger)
        with pytest.raises(CocoonError):
            await provider.ask("canary", judged(provider, "passed", "y"))
    assert (await network.types()).count("CanaryJudged") == 4


async def test_what_was_decided_just_before_a_crash_is_revoked_by_the_next(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.attestation.handlers import Attestation

    async def dies(*_: object) -> None:
        raise Unavailable("as if it died here")

    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        with monkeypatch.context() as patched:
            patched.setattr(Attestation, "_ban", dies)
            await tell(network, provider, *["differed"] * 3)
            with pytest.raises(Unavailable):
                await tell(network, provider, "differed", begin="last")
            assert (await network.types())[-1] == "HonestyDecided"
    async with network.running(sweep_s=0.05):
        for _ in range(200):
            if (await network.types())[-1] == "AttestationRevoked":
                break
            await asyncio.sleep(0.02)
    assert (await network.types())[-1] == "AttestationRevoked"


async def test_the_log_tells_it_again(network: Network, database: Database) -> None:
    async with network.running():
        provider = await (await Provider.connect(network)).admitted()
        await tell(network, provider, "passed", "unclear", *["differed"] * 5)
        await network.platform_ask("ban", BanRequest(provider_id=provider.provider_id, lift=True))
        await tell(network, provider, "passed", begin="new")
    conn = await connect_log(database.dsn("cocoon_reader"), "test")
    try:
        found = (await standings(conn, [1]))[provider.provider_id]
        events = {e.position: e for e in await read_batch(conn, 0, 1, 1000)}
        commands = await read_commands(conn, 0, 1, max(events))
    finally:
        await conn.close()
    assert dict(found.outcomes) == {"passed": 2, "unclear": 1, "differed": 5}
    assert (found.verdicts["dishonest"], found.state.dishonest) == (1, ())
    test = found.state.test(MODEL_ID)
    assert test is not None
    assert (test.judged, test.differed) == (1, 0)
    states: dict[str, domain.State] = {}
    for stored in commands:
        command = decode_command(stored.data)
        rows = [events[at] for at in range(stored.first_position, stored.last_position + 1)]
        stream = domain.stream_of(command)
        state = states.get(stream, domain.initial(stream))
        decided = domain.decide(state, command)
        assert [e.to_canonical() for e in decided] == [row.data for row in rows]
        for event in decided:
            state = domain.evolve(state, event, stream)
        states[stream] = state
