"""Composition of the agent: settings -> resources -> run. No decision is made here."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from functools import partial
from typing import Any

from nacl.signing import SigningKey

from cocoon.agent.config import AgentConfig
from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, raw_seed, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.evidence.trust import load_trust
from cocoon.kernel.clock import Clock, SystemClock, SystemRandomness
from cocoon.kernel.errors import ConfigurationError, Transient
from cocoon.kernel.ids import provider_id
from cocoon.telemetry.logs import get_logger
from services.provider.announcing import LONGEST_BACKOFF_S, Announcer, Identity, enrolment
from services.provider.enclave import Enclave
from services.provider.engines import prepare_model
from services.provider.entering import enter_patiently
from services.provider.epochs import KeyEpochs
from services.provider.frames import FrameSender
from services.provider.handlers import Handlers
from services.provider.heartbeat import Heart
from services.provider.jobs import Jobs
from services.provider.keyholder import harden
from services.provider.models import ServedModel
from services.provider.observing import observe
from services.provider.parts import Agent, end
from services.provider.policies import PolicyWatch
from services.provider.reloading import Prepare, Reloader
from services.provider.settings import ProviderSettings
from services.provider.spool import Spool
from services.provider.submitting import Submitter
from services.provider.table import ModelTable, start_all
from services.provider.tee import KernelTdx, OpenSource, QuoteSource, simulated_tdx
from services.provider.watching import StandingWatch

log = get_logger("services.provider")
ROLE = "provider"
POLICY_REFRESH_S = 5.0
ENTER_S = 30.0  # a network that starts lets nobody in yet
HEALTH_S = 2.0


def main() -> None:
    run(ROLE, ProviderSettings, serve)


async def serve(settings: ProviderSettings, stop: Stop) -> None:
    """Check the models, prove the machine, take jobs until stopped, then let them finish."""
    harden()
    clock, randomness = SystemClock(), SystemRandomness()
    config = await asyncio.to_thread(settings.config)
    prepare = partial(
        prepare_model, stop=stop, clock=clock, randomness=randomness,
        deadline_s=settings.job_timeout_s,
    )  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        loop, hung_up = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, hung_up.set)  # it ends neither start nor end
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)
        policies = _policies(config, clock)
        tee = _tee(config, clock)
        models = await _models(config, prepare, settings, clock, stack)
        if models is None:
            return
        agent = await _agent(settings, config, models, policies, tee, stack, stop)
        if agent is None:
            return
        reloader = Reloader(
            settings.config_file, config, models, prepare, policies.allows, clock, agent.changed
        )
        stack.push_async_callback(reloader.close)
        loop.add_signal_handler(signal.SIGHUP, reloader.ask)
        stack.callback(loop.add_signal_handler, signal.SIGHUP, hung_up.set)
        if hung_up.is_set():
            reloader.ask()
        for work, name in (
            (agent.submitter.run(), "submitter"),
            (agent.heart.run(), "heart"),
            (_watch_policy(policies, clock), "policy"),
            (_keep_models(models, agent.heart), "engines"),
        ):
            _spawn(stack, stop, work, name)
        await agent.handlers.listen_to_jobs()
        port = await observe(
            settings.observe_host, settings.observe_port, agent, reloader, stop, stack, clock,
            randomness,
        )  # fmt: skip
        if not await _announce(agent.announcer, stop):
            return
        _spawn(stack, stop, agent.announcer.run(), "announcer")
        watch = StandingWatch(
            agent.nc, agent.name, agent.announcer, clock, randomness,
            interval_s=settings.standing_s,
        )  # fmt: skip
        _spawn(stack, stop, watch.run(), "standing")
        first = models.wanted[0]
        announce_ready(
            ROLE, observe_port=port, provider_id=agent.name, model_id=first.model_id,
            model=first.config.name, models={m.config.name: m.model_id for m in models.wanted},
        )  # fmt: skip
        await stop.wait()
        reloader.closed = True
        await end(agent, stop, drain_s=settings.drain_s, flush_s=settings.flush_s)


async def _models(
    config: AgentConfig, prepare: Prepare, settings: ProviderSettings, clock: Clock,
    stack: contextlib.AsyncExitStack,
) -> ModelTable | None:  # fmt: skip
    """All models of the file, checked, and the warm ones started. None if asked to end."""
    served: list[ServedModel] = []
    for one in config.enabled:
        model = await prepare(one)
        if model is None:
            return None
        stack.push_async_callback(model.engine.close)
        served.append(model)
    await start_all(served)
    table = ModelTable(served, clock, grace_s=settings.grace_s)
    stack.push_async_callback(table.close)
    return table


async def _agent(
    settings: ProviderSettings, config: AgentConfig, models: ModelTable, policies: PolicyWatch,
    tee: QuoteSource, stack: contextlib.AsyncExitStack, stop: Stop,
) -> Agent | None:  # fmt: skip
    """Everything around a connection in a place of its own. None if asked to end before that."""
    clock, randomness = SystemClock(), SystemRandomness()
    seed = read_seed_file(config.agent.seed_file)
    identity = SigningKey(raw_seed(seed))
    name = provider_id(raw_public(seed))
    nc = await connect(
        config.network.bus, config.agent.seed_file, ROLE, inbox_prefix(name), stop, ENTER_S,
        config.network.ca_file,
    )  # fmt: skip
    stack.push_async_callback(close, nc)
    if not await enter_patiently(nc, name, enrolment(raw_public(seed), tee), stop):
        return None
    spool = Spool(
        config.agent.data_dir / "spool", settings.spool_max_items, settings.spool_max_bytes
    )
    await asyncio.to_thread(spool.open)
    stack.push_async_callback(spool.close)
    submitter = Submitter(
        nc.jetstream(), spool, identity, name, clock, first_backoff_s=settings.submit_backoff_s
    )
    submitter.adopt()
    epochs = KeyEpochs(
        epoch_ms=int(settings.epoch_s * 1000), overlap_ms=int(settings.overlap_s * 1000)
    )
    stack.callback(epochs.close)
    enclave = Enclave(epochs, policies.hashes, models.ids, clock, randomness)
    jobs = Jobs(
        nc, name, enclave, models, spool, submitter, FrameSender(nc, name), clock,
        job_timeout_s=settings.job_timeout_s, job_max_bytes=settings.job_max_bytes,
    )  # fmt: skip
    handlers = Handlers(nc, name, jobs, submitter)
    stack.push_async_callback(handlers.stop)
    await handlers.listen_to_acks()
    announcer = Announcer(
        nc, Identity(name, raw_public(seed), config.agent.region or ""), models, enclave, tee,
        clock,
        evidence_ms=int(settings.evidence_s * 1000), renew_ms=int(settings.renew_s * 1000),
        tick_s=min(1.0, settings.overlap_s / 4),
    )  # fmt: skip
    heart = Heart(
        nc, name, randomness.token(16).hex(),
        lambda: [*jobs.running_pairs(), *submitter.unsettled(settings.lease_hold_s)],
        lambda: not jobs.taking_jobs, models.room,
        interval_s=settings.heartbeat_s, full=models.full, away=models.away,
        barred=lambda: announcer.standing.barred,
    )  # fmt: skip
    agent = Agent(name, nc, models, jobs, spool, submitter, handlers, heart, announcer)
    jobs.on_crowding = agent.crowded
    return agent


def _policies(config: AgentConfig, clock: Clock) -> PolicyWatch:
    network = config.network
    path = network.policy_file or network.trust_file.with_name("policy.json")
    watch = PolicyWatch(path, load_trust(network.trust_file))
    watch.refresh(clock.now_ms())
    return watch


def _tee(config: AgentConfig, clock: Clock) -> QuoteSource:
    tee = config.tee
    if tee.kind == "none":
        return OpenSource(SigningKey(raw_seed(read_seed_file(config.agent.seed_file))))
    if tee.dev_authority_file is None:
        return KernelTdx()
    return simulated_tdx(tee.dev_authority_file, tee.dev_platform_file, clock)


async def _announce(announcer: Announcer, stop: Stop) -> bool:
    """Announce until the network takes it; False if the process is asked to end meanwhile."""
    pause_s = 0.25
    ending = asyncio.create_task(stop.wait())
    try:
        while not ending.done():
            try:
                await announcer.start()
                return True
            except Transient as error:
                log.warning("announce_failed", code=error.code, delay_s=pause_s)
                await asyncio.wait({ending}, timeout=pause_s)
                pause_s = min(pause_s * 2, LONGEST_BACKOFF_S)
        return False
    finally:
        ending.cancel()


async def _keep_models(models: ModelTable, heart: Heart) -> None:
    """Engines start, end and are looked after; one that is away takes no jobs, others get them."""
    while True:
        await asyncio.sleep(HEALTH_S)
        before = (models.taking_jobs, models.away())
        await models.keep()
        if before != (models.taking_jobs, models.away()):
            heart.changed()


async def _watch_policy(policies: PolicyWatch, clock: Clock) -> None:
    while True:
        await asyncio.sleep(POLICY_REFRESH_S)
        try:
            policies.refresh(clock.now_ms())
        except ConfigurationError as error:
            log.warning("policy_not_taken", code=error.code)


def _spawn(
    stack: contextlib.AsyncExitStack, stop: Stop, work: Coroutine[Any, Any, None], name: str
) -> None:
    task = stop.watch(asyncio.create_task(work, name=name))

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)
