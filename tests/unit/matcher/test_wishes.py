"""What a client wishes holds for every match of its job, also after the matcher restarted."""

from __future__ import annotations

import pytest

from cocoon.contracts.commands import ExpireLease, decode_command
from cocoon.contracts.events import (
    EventData,
    OpenTierLimitsSet,
    PolicyPublished,
    ProfiledModel,
    ProviderProfilePublished,
)
from cocoon.contracts.matching import OpenTierLimits, Preferences
from cocoon.domain.job import fold
from cocoon.domain.settling import decide_settle_result
from services.matcher import handlers
from tests.support.example_events import put
from tests.support.job_world import (
    ALICE,
    BOB,
    CAROL,
    MODEL,
    OFFERED,
    POLICY,
    PROVIDERS,
    Provider,
    hex16,
    job_request,
    settle_command,
)  # fmt: skip
from tests.support.matcher_world import MatcherWorld, ready_world

DEAR = OFFERED.model_copy(update={"output_nanoton_per_mtok": 4_500_000})
CAP = Preferences(max_output_nanoton_per_mtok=4_000_000)


def change(world: MatcherWorld, provider: Provider, event: EventData) -> None:
    """Attestation writes something of a provider."""
    put(world.network, f"provider/{provider.id}", [event])
    world.tail()


def makes_dearer(world: MatcherWorld, provider: Provider) -> None:
    _, offer, *_ = provider.network_events()
    change(world, provider, offer.model_copy(update={"models": (DEAR,)}))


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_job_is_matched_again_under_its_client_s_prices(restarts: bool) -> None:
    world = await ready_world()
    await world.ask(job_request(preferences=CAP, affinity=hex16("conversation")))
    first = world.matched_to()
    second, dear = [p for p in PROVIDERS if p is not first]
    makes_dearer(world, dear)
    if restarts:
        await world.restart()
        for provider in PROVIDERS:
            world.beat(provider)
    await world.sweep(4.0, second, dear)
    assert world.matched_to() is second
    expire = decode_command(next(
        one.data for one in world.log.commands.values() if b'"ExpireLease"' in one.data
    ))  # fmt: skip
    assert isinstance(expire, ExpireLease)
    assert (expire.preferences, expire.affinity) == (CAP, hex16("conversation"))


async def test_many_running_jobs_are_recalled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "RECALLED_AT_ONCE", 2)
    world = await ready_world()
    for number in range(5):
        await world.ask(job_request(f"job-{number}", preferences=CAP))
    await world.restart()
    jobs = [hex16(f"job-{number}") for number in range(5)]
    assert [world.memory.wishes_of(job).preferences for job in jobs] == [CAP] * 5


async def test_what_a_provider_tells_of_itself_can_be_wished_for() -> None:
    world = await ready_world()
    asked = Preferences(regions=("eu-west",), quantisations=("int8",))
    await world.ask(job_request("before", preferences=asked))
    assert world.last("before").kind == "refused"
    profile = ProviderProfilePublished(
        provider_id=BOB.id, region="eu-west",
        models=(ProfiledModel(model_id=MODEL, quantisation="int8"),),
    )  # fmt: skip
    change(world, BOB, profile)
    await world.ask(job_request(preferences=asked))
    assert world.matched_to() is BOB


async def test_an_account_s_waiting_jobs_are_served_by_their_priority() -> None:
    world = await ready_world(1_000_000, ALICE)
    await world.ask(*(job_request(f"running-{n}", providers=(ALICE,)) for n in range(2)))
    for name, priority in (("later", "flex"), ("first", "priority")):
        wishes = Preferences(priority=priority)  # type: ignore[arg-type]
        await world.ask(job_request(name, providers=(ALICE,), preferences=wishes))
        assert world.heard(name) == ["waiting"]
    state = fold(stored.decode() for stored in world.log.stream(f"job/{hex16('running-0')}"))
    settled = decide_settle_result(state, settle_command(state))
    put(world.log, f"job/{hex16('running-0')}", settled)
    world.tail()
    await world.sweep(0.2, ALICE)
    assert world.heard("first") == ["waiting", "matched", "committed"]
    assert world.heard("later") == ["waiting"]


# ---- the open tier ----


async def open_world(limits: OpenTierLimits | None) -> MatcherWorld:
    """Alice has no TEE; the network's policy allows her what `limits` say."""
    world = await ready_world(1_000_000, ALICE, CAROL)
    _, _, attested, bundle = ALICE.network_events()
    change(world, ALICE, attested.model_copy(update={"assurance": "open"}))
    change(world, ALICE, bundle)
    published = PolicyPublished(policy_hash=POLICY, version=1, previous_hash=None)
    told = [] if limits is None else [OpenTierLimitsSet(policy_hash=POLICY, limits=limits)]
    put(world.network, "policy/network", [*told, published])
    world.tail()
    return world


ASKED = Preferences(tiers=("open",))


async def test_the_open_tier_is_for_those_who_ask_for_it() -> None:
    world = await open_world(OpenTierLimits(max_running_jobs=1, max_job_nanoton=10_000))
    await world.ask(job_request("careful"))
    assert world.matched_to("careful") is CAROL
    await world.ask(job_request("bold", preferences=ASKED))
    assert world.matched_to("bold") is ALICE


async def test_an_open_provider_that_runs_as_many_as_it_may_is_waited_for() -> None:
    world = await open_world(OpenTierLimits(max_running_jobs=1, max_job_nanoton=10_000))
    await world.ask(job_request("first", preferences=ASKED))
    await world.ask(job_request("second", preferences=ASKED))
    assert world.last("second").kind == "waiting"


@pytest.mark.parametrize("limits", [None, OpenTierLimits(max_running_jobs=9, max_job_nanoton=9)])
async def test_what_the_policy_does_not_allow_the_open_tier_is_refused(
    limits: OpenTierLimits | None,
) -> None:
    world = await open_world(limits)
    await world.ask(job_request(preferences=ASKED))
    assert world.last().error is not None
    assert world.last().error.code == "no_provider_open_limits"  # type: ignore[union-attr]
