"""A real gateway on a real bus and database, with a matcher and providers that a test scripts.

They speak the contracts, keep what they hear, and write the events a real one would write.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from nats.aio.client import Client
from nats.aio.msg import Msg

from cocoon.bus.requests import ask
from cocoon.bus.sealed import get_sealed, put_sealed
from cocoon.bus.service import Stop
from cocoon.contracts import messages, subjects
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import (
    EventData,
    FundsHeld,
    JobRequested,
    PaymentSettled,
    ProviderMatched,
    Quote,
    ResultSealed,
)  # fmt: skip
from cocoon.contracts.messages import (
    CancelJob,
    CreateKeyRequest,
    DispatchReply,
    DispatchReport,
    JobRequest,
    MatchUpdate,
    RevokeKeyRequest,
)  # fmt: skip
from cocoon.devnet.ports import accepts, free_port
from cocoon.domain.pricing import quote_id
from cocoon.eventlog.append import LogAppender
from cocoon.kernel.clock import SystemClock
from cocoon.sealing import KeyRing, Profile, Recipient, RequestHeader, pack_flags, seal_request
from services.gateway.main import serve
from services.gateway.settings import GatewaySettings
from tests.support.servers import Bus, Database

ACCOUNT = "acct_00000000000000a1"
SEALED_TYPE = "application/vnd.cocoon.cai1"
MODEL = hashlib.sha256(b"model").digest()
QUOTE = Quote(
    model_id=MODEL.hex(), input_nanoton_per_mtok=1000, cached_input_nanoton_per_mtok=500,
    output_nanoton_per_mtok=2000, fee_bps=500,
)  # fmt: skip
EVIDENCE = hashlib.sha256(b"evidence").hexdigest()
WAIT_S = 10.0


class _Randomness:
    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)


def envelope(
    *, stream: bool = True, body: bytes = b"{}", job: bytes | None = None, ttl_ms: int = 60_000
) -> tuple[str, bytes]:
    """A job id and a sealed request with it."""
    job_id = job or secrets.token_bytes(16)
    header = RequestHeader(
        job_id=job_id, model_id=MODEL, max_price_nanoton=1_000_000, max_input_tokens=4096,
        max_output_tokens=1024, not_after_ms=SystemClock().now_ms() + ttl_ms,
        policy_hash=bytes(32),
        flags=pack_flags(Profile.P2 if stream else Profile.P0, stream=stream),
    )  # fmt: skip
    recipient = Recipient.of(KeyRing().add(secrets.token_bytes(32)))
    sealed = seal_request(
        header=header, recipients=[recipient], endpoint="/v1/chat/completions", body=body,
        randomness=_Randomness(),
    )  # fmt: skip
    return job_id.hex(), sealed.envelope


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that must come about."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - of many services, not of one event
            await asyncio.sleep(0.005)


class Matcher:
    """Shard 1's matcher, as a test scripts it. By default it matches the first provider."""

    def __init__(self, nc: Client, appender: LogAppender, providers: tuple[str, ...]) -> None:
        self._nc, self.appender, self._providers = nc, appender, providers
        self.requests: list[JobRequest] = []
        self.committed: set[tuple[str, int]] = set()  # job and epoch
        self.reports: list[DispatchReport] = []
        self.cancels: list[CancelJob] = []
        self.on_request: Callable[[JobRequest], Awaitable[None]] = self.match_and_commit
        self.on_report: Callable[[DispatchReport], Awaitable[None]] | None = None

    async def listen(self) -> None:
        await self._nc.subscribe("rpc.matcher.1.*", cb=self._heard)
        await self._nc.flush()

    async def _heard(self, message: Msg) -> None:
        if message.subject == subjects.request_job(1):
            self.requests.append(JobRequest.model_validate_json(message.data))
            await self.on_request(self.requests[-1])
        elif message.subject == subjects.report_dispatch(1):
            self.reports.append(DispatchReport.model_validate_json(message.data))
            if self.on_report is not None:
                await self.on_report(self.reports[-1])
        else:
            self.cancels.append(CancelJob.model_validate_json(message.data))

    async def tell(self, request: JobRequest, kind: str, **fields: Any) -> None:
        update = MatchUpdate(**{"kind": kind, "job_id": request.job_id, **fields})
        subject = subjects.match_updates(request.gateway_id, request.job_id)
        await self._nc.publish(subject, update.model_dump_json().encode())

    async def match(self, request: JobRequest, epoch: int = 1, provider: int = 0) -> None:
        await self.tell(
            request, "matched", epoch=epoch, provider_id=self._providers[provider], quote=QUOTE,
            quote_id=quote_id(QUOTE), evidence_id=EVIDENCE, lease_ttl_ms=10_000,
        )  # fmt: skip

    async def commit(self, request: JobRequest, epoch: int = 1, provider: int = 0) -> None:
        """Append what a match consists of, and say so."""
        events: list[EventData] = []
        if epoch == 1:
            fields = request.model_dump(exclude={"gateway_id", "command_id"})
            events.append(JobRequested(**_known(JobRequested, request, fields)))
            events.append(
                FundsHeld(
                    job_id=request.job_id, account_id=request.account_id, amount_nanoton=1_000_000
                )
            )
        events.append(
            ProviderMatched(
                job_id=request.job_id, provider_id=self._providers[provider], epoch=epoch,
                key_id="0" * 32, lease_ttl_ms=10_000, quote=QUOTE, quote_id=quote_id(QUOTE),
                evidence_id=EVIDENCE, signing_key="0" * 64, attested_position=1,
            )
        )  # fmt: skip
        await append(self.appender, request.job_id, f"match-{epoch}", events)
        self.committed.add((request.job_id, epoch))
        await self.tell(request, "committed", epoch=epoch, position=1)

    async def match_and_commit(self, request: JobRequest) -> None:
        await self.match(request)
        await self.commit(request)

    async def refuse(self, request: JobRequest, status: int, code: str, **more: Any) -> None:
        error = messages.ErrorBody(status=status, code=code, message=f"refused: {code}", **more)
        await self.tell(request, "refused", error=error)


def _known(cls: type[EventData], request: JobRequest, fields: dict[str, Any]) -> dict[str, Any]:
    if "gateway_id" in cls.model_fields:
        fields["gateway_id"] = request.gateway_id
    return {name: value for name, value in fields.items() if name in cls.model_fields}


async def append(appender: LogAppender, job_id: str, name: str, events: list[EventData]) -> None:
    stream = f"job/{job_id}"
    await appender.append(
        AppendItem(
            command_id=f"{name}-{job_id}", command=b'{"kind":"test"}', actor="test",
            correlation_id=job_id, expects=(),
            events=tuple(NewEvent(stream, event) for event in events),
        )
    )  # fmt: skip


@dataclass
class Dispatch:
    """One run_job as a provider got it."""

    job_id: str
    epoch: int
    gateway_id: str
    body: bytes
    headers: dict[str, str]


class Provider:
    """One provider, as a test scripts it. By default it accepts and sends `response` in halves."""

    def __init__(
        self, nc: Client, provider_id: str, billing: LogAppender, committed: set[tuple[str, int]]
    ) -> None:
        self.nc, self.id, self._billing, self._committed = nc, provider_id, billing, committed
        self.dispatches: list[Dispatch] = []
        self.cancels: list[CancelJob] = []
        self.response = b"CAI1" + secrets.token_bytes(5000)
        self.reply: DispatchReply | None = DispatchReply(accepted=True)
        self.run: Callable[[Dispatch], Awaitable[None]] = self.send_all

    async def listen(self) -> None:
        await self.nc.subscribe(f"cmd.provider.{self.id}.*", cb=self._heard)
        await self.nc.flush()

    async def _heard(self, message: Msg) -> None:
        if message.subject == subjects.cancel_job(self.id):
            self.cancels.append(CancelJob.model_validate_json(message.data))
            return
        headers = dict(message.headers or {})
        body = message.data
        if messages.H_SEALED in headers:
            body = await get_sealed(self.nc, self.id, headers[messages.H_SEALED])
        job = Dispatch(
            headers[messages.H_JOB], int(headers[messages.H_EPOCH]),
            headers[messages.H_GATEWAY], body, headers,
        )  # fmt: skip
        self.dispatches.append(job)
        if self.reply is None:
            return
        await self.answer(job, self.reply)
        if self.reply.accepted:
            await self.run(job)

    async def answer(self, job: Dispatch, reply: DispatchReply) -> None:
        subject = subjects.tokens(job.gateway_id, self.id, job.job_id, job.epoch)
        await self.nc.publish(subject, b"\2" + reply.model_dump_json().encode())

    async def frame(self, job: Dispatch, start: int, end: int) -> None:
        data = b"\0" + start.to_bytes(8, "big") + self.response[start:end]
        await self.nc.publish(subjects.tokens(job.gateway_id, self.id, job.job_id, job.epoch), data)

    async def last_frame(self, job: Dispatch, start: int) -> None:
        data = b"\1" + start.to_bytes(8, "big") + hashlib.sha256(self.response).digest()
        await self.nc.publish(
            subjects.tokens(job.gateway_id, self.id, job.job_id, job.epoch),
            data + self.response[start:],
        )

    async def send_all(self, job: Dispatch) -> None:
        half = len(self.response) // 2
        await self.frame(job, 0, half)
        await self.last_frame(job, half)

    async def store(self) -> str:
        return await put_sealed(self.nc.jetstream(), self.id, self.response)

    async def settle(self, job_id: str, epoch: int = 1, price_nanoton: int = 700) -> None:
        """Store the response, and append what billing would: nothing before the match."""
        blob_hash = await self.store()
        await until(lambda: (job_id, epoch) in self._committed)
        result = ResultSealed(
            job_id=job_id, provider_id=self.id, epoch=epoch, status="complete",
            receipt="00" * 420, resp_hash="0" * 64, blob_hash=blob_hash,
            response_bytes=len(self.response), input_tokens=5, cached_input_tokens=0,
            output_tokens=7, reasoning_tokens=0,
        )  # fmt: skip
        paid = PaymentSettled(
            job_id=job_id, account_id=ACCOUNT, api_key_id="key_a1", provider_id=self.id,
            epoch=epoch, quote_id=quote_id(QUOTE), held_nanoton=1_000_000,
            price_nanoton=price_nanoton, provider_nanoton=price_nanoton, fee_nanoton=0,
            released_nanoton=1_000_000 - price_nanoton,
        )  # fmt: skip
        await append(self._billing, job_id, f"settle-{epoch}", [result, paid])


@dataclass
class World:
    http: httpx.AsyncClient
    matcher: Matcher
    providers: tuple[Provider, ...]
    operator: Client
    database: Database
    bus: Bus
    port: int
    observe_port: int
    billing: LogAppender
    key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def provider(self) -> Provider:
        return self.providers[0]

    def headers(self, **more: str) -> dict[str, str]:
        return {
            "authorization": f"Bearer {self.key}",
            "content-type": SEALED_TYPE,
            **{name.replace("_", "-"): value for name, value in more.items()},
        }

    async def post(self, body: bytes, **more: str) -> httpx.Response:
        return await self.http.post("/v1/jobs", content=body, headers=self.headers(**more))

    async def get(self, path: str, **more: str) -> httpx.Response:
        return await self.http.get(path, headers=self.headers(**more))

    async def create_key(self, name: str = "key_a1", account: str = ACCOUNT) -> str:
        text = "ck_" + secrets.token_urlsafe(32)
        request = CreateKeyRequest(
            api_key_id=name, secret_hash=hashlib.sha256(text.encode()).hexdigest(),
            account_id=account, label="test",
        )  # fmt: skip
        await ask(self.operator, subjects.gateway_keys("create"), request)
        return text

    async def revoke_key(self, name: str = "key_a1") -> None:
        await ask(self.operator, subjects.gateway_keys("revoke"), RevokeKeyRequest(api_key_id=name))


@contextlib.asynccontextmanager
async def gateway_world(bus: Bus, database: Database, **changes: Any) -> AsyncIterator[World]:
    """A gateway with these settings, listening; ends with everything closed."""
    dsn_file = bus.folder / f"gateway-{secrets.token_hex(4)}.dsn"
    dsn_file.write_text(database.dsn("cocoon_gateway"))
    port, observe_port = free_port(), free_port()
    settings = GatewaySettings(
        nats_url=bus.server.url, nats_seed_file=bus.seed_file("gateway"),
        postgres_dsn_file=dsn_file, listen_port=port, observe_port=observe_port,
        drain_s=1.0, **changes,
    )  # fmt: skip
    stop = Stop()
    running = asyncio.create_task(serve(settings, stop))
    async with contextlib.AsyncExitStack() as stack:

        async def end() -> None:
            stop()
            await running

        stack.push_async_callback(end)
        appenders = []
        for role in ("matcher", "billing"):
            appender = LogAppender(database.dsn(f"cocoon_{role}"), 1, role)
            await appender.acquire_term()
            stack.push_async_callback(appender.close)
            appenders.append(appender)
        matcher = Matcher(await bus.connect("matcher"), appenders[0], bus.providers)
        await matcher.listen()
        providers = tuple(
            [
                Provider(await bus.connect(name), name, appenders[1], matcher.committed)
                for name in bus.providers
            ]
        )
        for provider in providers:
            await provider.listen()
        await until(lambda: running.done() or accepts(port))
        if running.done():
            await running
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S)
        )
        world = World(
            http, matcher, providers, await bus.connect("operator"), database, bus, port,
            observe_port, appenders[1],
        )  # fmt: skip
        world.key = await world.create_key()
        yield world


async def open_line(
    world: World, sealed: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=4096)
    writer.write(
        f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.key}\r\n"
        "content-type: application/vnd.cocoon.cai1\r\n"
        f"content-length: {len(sealed)}\r\n\r\n".encode()
        + sealed
    )
    await writer.drain()
    return reader, writer


async def close_line(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()
