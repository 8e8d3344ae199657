"""Composition of the agent: settings -> resources -> run. No decision is made here."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from cocoon.bus.connection import close, connect
from cocoon.bus.keys import raw_public, raw_seed, read_seed_file
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.chat import Capabilities
from cocoon.contracts.events import OfferedModel, ProfiledModel
from cocoon.contracts.messages import EnrolRequest
from cocoon.evidence.trust import load_trust
from cocoon.kernel.clock import Clock, SystemClock, SystemRandomness
from cocoon.kernel.errors import ConfigurationError, Transient
from cocoon.kernel.ids import provider_id
from cocoon.models import ModelManifest
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.observe import serve_observe
from services.provider.announcing import LONGEST_BACKOFF_S, Announced, Announcer, enrolment
from services.provider.backends.base import Backend, EngineLoad
from services.provider.backends.onnx import OnnxBackend
from services.provider.backends.openai_compatible import OpenAICompatibleBackend
from services.provider.enclave import Enclave
from services.provider.entering import enter_patiently
from services.provider.epochs import KeyEpochs
from services.provider.frames import FrameSender
from services.provider.handlers import Handlers
from services.provider.heartbeat import Heart
from services.provider.jobs import Jobs
from services.provider.policies import PolicyWatch
from services.provider.running import Served
from services.provider.settings import ProviderSettings
from services.provider.spool import Spool
from services.provider.submitting import Submitter
from services.provider.tee import KernelTdx, OpenSource, QuoteSource, simulated_tdx
from services.provider.weights import check_context, checked_manifest, is_grpc, server_model

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.bus.client import BusClient

log = get_logger("services.provider")
ROLE = "provider"
POLICY_REFRESH_S = 5.0
HEALTH_S = 2.0
ENTER_S = 30.0  # a network that starts lets nobody in yet


def main() -> None:
    run(ROLE, ProviderSettings, serve)


async def serve(settings: ProviderSettings, stop: Stop) -> None:
    """Load the model, prove the machine, take jobs until stopped, then let them finish."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold prompts
    clock, randomness = SystemClock(), SystemRandomness()
    seed = read_seed_file(settings.nats_seed_file)
    identity = SigningKey(raw_seed(seed))
    name = provider_id(raw_public(seed))
    policies = _policies(settings, clock)
    tee = _tee(settings, identity, clock)
    async with contextlib.AsyncExitStack() as stack:
        load = EngineLoad()
        manifest = await checked_manifest(settings, stop)
        if manifest is None:
            return
        backend = _backend(settings, manifest, randomness, load)
        stack.push_async_callback(backend.close)
        check_context(manifest, backend.context_tokens)
        await backend.start()
        offer = _offer(settings, manifest, backend)
        nc = await _come_in(settings, name, enrolment(raw_public(seed), tee), stack, stop)
        if nc is None:
            return
        spool = Spool(
            settings.data_dir / "spool", settings.spool_max_items, settings.spool_max_bytes
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
        model_ids = frozenset({bytes.fromhex(manifest.model_id)})
        enclave = Enclave(epochs, policies.hashes, model_ids, clock, randomness)
        served = Served(manifest.model_id, (manifest.name, manifest.model_id), backend)
        jobs = _jobs(settings, nc, name, enclave, served, spool, submitter, clock)
        handlers = Handlers(nc, name, jobs, submitter)
        stack.push_async_callback(handlers.stop)
        await handlers.listen_to_acks()
        heart = Heart(
            nc, name, randomness.token(16).hex(),
            lambda: [*jobs.running_pairs(), *submitter.unsettled(settings.lease_hold_s)],
            lambda: not jobs.taking_jobs,
            concurrency=settings.concurrency, interval_s=settings.heartbeat_s, load=load,
        )  # fmt: skip
        _spawn(stack, stop, submitter.run(), "submitter")
        _spawn(stack, stop, heart.run(), "heart")
        _spawn(stack, stop, _watch_policy(policies, clock), "policy")
        _spawn(stack, stop, _watch_engine(backend, jobs), "engine")
        await handlers.listen_to_jobs()
        announcer = Announcer(
            nc, _announced(settings, raw_public(seed), manifest, offer), enclave, tee, clock,
            evidence_ms=int(settings.evidence_s * 1000),
            renew_ms=int(settings.renew_s * 1000), tick_s=min(1.0, settings.overlap_s / 4),
        )  # fmt: skip
        port, closer = await serve_observe(
            settings.observe_host,
            settings.observe_port,
            lambda: {
                "bus": nc.is_connected,
                "announced": announcer.ready(),
                "taking_jobs": jobs.taking_jobs,
            },
        )
        stack.push_async_callback(closer)
        if not await _announce(announcer, stop):
            return
        _spawn(stack, stop, announcer.run(), "announcer")
        announce_ready(
            ROLE, observe_port=port, provider_id=name, model_id=manifest.model_id,
            model=manifest.name,
        )  # fmt: skip
        await stop.wait()
        jobs.draining = True
        await heart.beat()  # the matcher stops sending at once
        await jobs.drain(settings.drain_s)


async def _come_in(
    settings: ProviderSettings,
    name: str,
    request: EnrolRequest,
    stack: contextlib.AsyncExitStack,
    stop: Stop,
) -> BusClient | None:
    """A connection in a place of this agent's own; None if the process is asked to end first."""
    nc = await connect(
        settings.nats_url, settings.nats_seed_file, ROLE, inbox_prefix(name), stop, ENTER_S,
        settings.nats_ca_file,
    )  # fmt: skip
    stack.push_async_callback(close, nc)
    return nc if await enter_patiently(nc, name, request, stop) else None


def _policies(settings: ProviderSettings, clock: Clock) -> PolicyWatch:
    path = settings.policy_file or settings.trust_file.with_name("policy.json")
    watch = PolicyWatch(path, load_trust(settings.trust_file))
    watch.refresh(clock.now_ms())
    return watch


def _tee(settings: ProviderSettings, identity: SigningKey, clock: Clock) -> QuoteSource:
    if settings.tee_kind == "none":
        return OpenSource(identity)
    if settings.dev_authority_file is None:
        return KernelTdx()
    if settings.environment != "dev":
        raise ConfigurationError(
            "a DEV ONLY authority simulates the TEE, but the environment is prod; leave "
            "COCOON_PROVIDER_DEV_AUTHORITY_FILE out, or set COCOON_PROVIDER_ENVIRONMENT=dev"
        )
    return simulated_tdx(settings.dev_authority_file, settings.dev_platform_file, clock)


def _backend(
    settings: ProviderSettings, manifest: ModelManifest, randomness: SystemRandomness,
    load: EngineLoad,
) -> Backend:  # fmt: skip
    """The engine for a model whose files are checked already."""
    if settings.backend_url is not None:
        return _server(settings, settings.backend_url, manifest, randomness, load)
    return OnnxBackend(settings.model_dir, queue_limit=settings.concurrency, randomness=randomness)


def _server(
    settings: ProviderSettings, url: str, manifest: ModelManifest, randomness: SystemRandomness,
    load: EngineLoad,
) -> Backend:  # fmt: skip
    model = server_model(settings, manifest)
    key_file = settings.backend_api_key_file
    try:
        api_key = key_file.read_text(encoding="utf-8").strip() if key_file else None
    except OSError:
        raise ConfigurationError(f"the engine's key file {key_file} cannot be read") from None
    shared: dict[str, Any] = {
        "context_tokens": settings.backend_context_tokens,
        "capabilities": Capabilities(**dict.fromkeys(settings.backend_capabilities, True)),
        "queue_limit": settings.concurrency,
        "read_timeout_s": settings.backend_read_timeout_s,
        "deadline_s": settings.job_timeout_s,
        "api_key": api_key,
    }
    if not is_grpc(settings):
        return OpenAICompatibleBackend(url, model, **shared)
    # gRPC costs a third of a second to load: only those who use it pay
    from services.provider.backends.triton import TritonBackend

    return TritonBackend(
        url, model, **shared, randomness=randomness, load=load,
        metrics_url=settings.backend_metrics_url,
        ca_file=settings.backend_ca_file,
    )  # fmt: skip


def _offer(settings: ProviderSettings, manifest: ModelManifest, backend: Backend) -> OfferedModel:
    return OfferedModel(
        model_id=manifest.model_id,
        name=manifest.name,
        context_tokens=backend.context_tokens,
        input_nanoton_per_mtok=settings.input_nanoton_per_mtok,
        cached_input_nanoton_per_mtok=settings.cached_input_nanoton_per_mtok,
        output_nanoton_per_mtok=settings.output_nanoton_per_mtok,
    )


def _announced(
    settings: ProviderSettings, identity: bytes, manifest: ModelManifest, offer: OfferedModel
) -> Announced:
    profiled = ProfiledModel(model_id=manifest.model_id, quantisation=manifest.quantisation)
    return Announced(
        provider_id(identity), identity, (offer,), settings.concurrency, settings.region,
        (profiled,),
    )  # fmt: skip


def _jobs(
    settings: ProviderSettings, nc: Client, name: str, enclave: Enclave, served: Served,
    spool: Spool, submitter: Submitter, clock: Clock,
) -> Jobs:  # fmt: skip
    prices = (
        settings.input_nanoton_per_mtok,
        settings.cached_input_nanoton_per_mtok,
        settings.output_nanoton_per_mtok,
    )
    return Jobs(
        nc, name, enclave, served, spool, submitter, FrameSender(nc, name), clock,
        concurrency=settings.concurrency, prices=[prices], job_timeout_s=settings.job_timeout_s,
        job_max_bytes=settings.job_max_bytes,
    )  # fmt: skip


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


async def _watch_engine(backend: Backend, jobs: Jobs) -> None:
    """An engine that is away takes no jobs: the heartbeat says so, and others get them."""
    while True:
        await asyncio.sleep(HEALTH_S)
        ready = await backend.healthy()
        if ready != jobs.engine_ready:
            log.warning("engine_changed", ready=ready)
        jobs.engine_ready = ready


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
