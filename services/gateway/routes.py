"""The only public HTTP of the network: thin routes over the gateway's handlers, raw ASGI.

A plaintext request is refused by its address and type, before its body is looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import ssl
from typing import Final
from urllib.parse import parse_qs

from pydantic import ValidationError

from cocoon.bus.requests import ask
from cocoon.contracts import subjects
from cocoon.contracts.events import DisputeOpened
from cocoon.contracts.messages import BalanceRequest, Dispute, DisputeRequest
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    ConfigurationError,
    MethodNotAllowed,
    NotFound,
)  # fmt: skip
from cocoon.kernel.ids import is_job_id
from cocoon.sealing.envelope import parse_header
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.gateway import jobs
from services.gateway.budget import Share
from services.gateway.directory import Directory
from services.gateway.handlers import Gateway, RunJob
from services.gateway.http import (
    FOR_EVER,
    SEALED_TYPE,
    ClientGone,
    Receive,
    Request,
    Scope,
    Send,
    StreamedResponse,
    send_error,
    send_json,
)
from services.gateway.keys import KeyRing
from services.gateway.manifests import Manifests
from services.gateway.run import response_headers
from services.gateway.settings import GatewaySettings
from services.gateway.store import ApiKey
from services.gateway.wishes import read_affinity, read_preferences

log = get_logger("cocoon.gateway.http")
_IDEMPOTENCY_KEY: Final = re.compile(rb"[\x21-\x7e]{1,255}\Z")
_TRACEPARENT: Final = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_RANGE: Final = re.compile(rb"bytes=([0-9]{1,12})-\Z")
_MODEL: Final = re.compile(r"[\x21-\x7e]{1,128}\Z")
_READS: Final = frozenset({"/v1/network", "/v1/directory", "/v1/models", "/v1/balance"})
_JOB_PATH: Final = re.compile(r"/v1/jobs/[0-9a-f]{32}(/response|/explanation|/dispute)?\Z")
_MANIFESTS: Final = "/v1/manifests/"
_MODEL_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
MAX_DISPUTE_BYTES: Final = 4096
_HOST: Final = re.compile(rb"[A-Za-z0-9.\-\[\]:]{1,255}\Z")


class Routes:
    """The ASGI application."""

    def __init__(
        self, gateway: Gateway, keys: KeyRing, directory: Directory, manifests: Manifests,
        clock: Clock,
    ) -> None:  # fmt: skip
        self._gateway, self._keys, self._directory = gateway, keys, directory
        self._manifests, self._clock = manifests, clock
        self._bus = bus_told(gateway.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = StreamedResponse(request, send)
        route, status = "unknown", 200
        try:
            route, status = await self._route(request, response, send)
        except ClientGone:
            return
        except CocoonError as error:
            status = error.http_status
            await self._refuse(request, response, send, error)
        except Exception:
            log.exception("request_failed")
            status = 500
            failed = CocoonError("the gateway failed; send the request again")
            await self._refuse(request, response, send, failed)
        finally:
            response.end()
        metrics.HTTP_REQUESTS.inc(route, f"{status // 100}xx")

    async def _refuse(
        self, request: Request, response: StreamedResponse, send: Send, error: CocoonError
    ) -> None:
        metrics.REFUSALS.inc(error.code)
        if not response.started:
            await send_error(send, request, error)

    async def _route(
        self, request: Request, response: StreamedResponse, send: Send
    ) -> tuple[str, int]:
        """Run the request's route; return its name and the status answered."""
        method, path = request.method, request.path
        _check_method(method, path)
        if method == "POST":
            if _JOB_PATH.match(path) is not None:  # of a job's addresses only the dispute's
                return await self._dispute(request, send)
            if path != "/v1/jobs" or _media_type(request) != SEALED_TYPE:
                raise self._plaintext_refused(request)
            await self._run_job(request, response)
            return "run_job", 200
        if not path.strip("/"):  # somebody opens the address in a browser
            raise NotFound(
                "this is a gateway of the Cocoon network: it takes sealed requests under /v1 and "
                "reads none of them. Send OpenAI requests to a sidecar on your own machine "
                "(`./cocoon connect`); the API is in docs/openapi.json of Cocoon's repository"
            )
        admission = self._gateway.admission
        if method == "GET" and path == "/v1/network":
            with admission.enter_public_read(request.peer):
                await send_json(send, await self._network())
            return "network", 200
        if method == "GET" and path == "/v1/directory":
            with admission.enter_public_read(request.peer):
                listing = await self._directory.listing(_wanted_model(request))
                await send_json(send, listing.body)
            return "directory", 200
        if method == "GET" and path.startswith("/v1/manifests/"):
            with admission.enter_public_read(request.peer):
                await self._manifest(path.removeprefix(_MANIFESTS), send)
            return "manifest", 200
        key = await self._authenticate(request)
        with admission.enter_read(key.api_key_id) as share:
            if method == "GET" and path == "/v1/models":
                await send_json(send, await self._directory.models())
                return "models", 200
            if method == "GET" and path == "/v1/balance":
                await send_json(send, await self._balance(key))
                return "balance", 200
            if path.startswith("/v1/jobs/"):
                return await self._job(request, response, send, key, share)
        raise NotFound("there is no such address here; sealed requests go to POST /v1/jobs")

    async def _authenticate(self, request: Request) -> ApiKey:
        return await self._keys.authenticate(request.headers.get(b"authorization"))

    # ---- the hot route ----

    async def _run_job(self, request: Request, response: StreamedResponse) -> None:
        key = await self._authenticate(request)
        headers = request.headers
        idempotency_key = headers.get(b"idempotency-key", b"")
        if idempotency_key and _IDEMPOTENCY_KEY.match(idempotency_key) is None:
            raise BadRequest(
                "an Idempotency-Key is 1 to 255 visible ASCII characters", param="Idempotency-Key"
            )
        preferences, affinity = read_preferences(headers), read_affinity(headers)
        traceparent = headers.get(b"traceparent", b"")
        if _TRACEPARENT.match(traceparent) is None:
            traceparent = b""
        with self._gateway.admission.enter(key.api_key_id) as slot:
            timeout_s = self._gateway.settings.body_timeout_s
            envelope, req_hash = await request.sealed_body(slot.body, timeout_s)
            header, _ = parse_header(envelope)
            job = RunJob(
                key, header, envelope, req_hash, idempotency_key.decode(), traceparent.decode(),
                preferences, affinity,
            )  # fmt: skip
            await self._gateway.do_run_job(job, response, slot)

    # ---- the others ----

    async def _job(
        self, request: Request, response: StreamedResponse, send: Send, key: ApiKey, share: Share
    ) -> tuple[str, int]:
        job_id, _, rest = request.path.removeprefix("/v1/jobs/").partition("/")
        if not is_job_id(job_id) or rest not in ("", "response", "explanation"):
            raise NotFound("there is no such job of this account", code="job_not_found")
        shard = self._gateway.settings.shard_of(key.account_id)
        record = await jobs.read_owned_job(self._gateway.pool, shard, job_id, key.account_id)
        if request.method == "GET" and rest == "explanation":
            decisions = await jobs.read_explanations(self._gateway.pool, shard, job_id)
            await send_json(send, {"id": job_id, "decisions": decisions})
            return "job_explanation", 200
        if request.method == "GET" and rest:
            return "job_response", await self._stored_response(request, response, record, share)
        if request.method == "GET":
            dispute = await jobs.read_dispute(self._gateway.pool, shard, job_id)
            await send_json(send, {**jobs.describe(record), "dispute": dispute})
            return "job", 200
        match = record.state.match
        if not record.state.status.is_terminal:
            provider_id = match.provider_id if match else ""
            await self._gateway.cancel(shard, job_id, provider_id, record.state.epoch)
        await send_json(send, jobs.describe(record), 202)
        return "cancel_job", 202

    async def _dispute(self, request: Request, send: Send) -> tuple[str, int]:
        """Hand a client's dispute to billing, which checks the receipt; once a job."""
        key = await self._authenticate(request)
        job_id = request.path.removeprefix("/v1/jobs/").partition("/")[0]
        settings = self._gateway.settings
        with self._gateway.admission.enter_read(key.api_key_id):
            body = await request.small_body(MAX_DISPUTE_BYTES, settings.body_timeout_s)
            try:
                dispute = Dispute.model_validate_json(body)
            except ValidationError:
                raise BadRequest("this is not a dispute; docs/honesty.md has its form") from None
            opened = await ask(
                self._gateway.nc,
                subjects.billing(settings.shard_of(key.account_id), "dispute"),
                DisputeRequest(job_id=job_id, account_id=key.account_id, dispute=dispute),
                settings.rpc_timeout_s,
            )
            event = DisputeOpened.model_validate_json(opened)
            await send_json(send, {"id": job_id, "dispute": jobs.told_dispute(event)}, 201)
        return "dispute", 201

    async def _stored_response(
        self, request: Request, response: StreamedResponse, record: jobs.JobRecord, share: Share
    ) -> int:
        match, digest, total = jobs.stored_response(record)
        offset, status, headers = 0, 200, response_headers(record.job_id, match)
        asked = _RANGE.match(request.headers.get(b"range", b""))
        if asked is not None:
            offset, status = int(asked[1]), 206
            if offset >= total:
                raise BadRequest(
                    f"the response has {total} bytes; ask for an earlier range",
                    code="range_not_satisfiable",
                )
            headers.append((b"content-range", b"bytes %d-%d/%d" % (offset, total - 1, total)))
        headers.append((b"accept-ranges", b"bytes"))
        stored = self._gateway.stored_bytes(match.provider_id, digest, offset, total, share)
        async with contextlib.aclosing(stored) as pieces:
            async for data in pieces:  # the headers only once there is something to send
                if not response.started:
                    await response.start(headers, total - offset, status)
                if not await response.send_within(data, self._gateway.settings.send_timeout_s):
                    return status
        if not response.started:
            await response.start(headers, 0, status)
        await response.finish()
        return status

    async def _manifest(self, model_id: str, send: Send) -> None:
        """The bytes that hash to the id; a browser is not to make anything else of them."""
        if _MODEL_ID.match(model_id) is None:
            raise NotFound(
                "a manifest's address ends with its model id: 64 hex digits in lower case",
                code="manifest_not_found",
            )
        document = await self._manifests.document(model_id)
        headers = ((b"etag", b'"%b"' % model_id.encode()), (b"x-content-type-options", b"nosniff"))
        await send_json(send, document, headers=headers, cached=FOR_EVER)

    async def _network(self) -> dict[str, object]:
        return {
            **await self._directory.network(),
            "now_ms": self._clock.now_ms(),
            "shards": {
                "network": subjects.NETWORK_SHARD,
                "accounts": list(self._gateway.settings.account_shards),
            },
            "bus": self._bus,
        }

    async def _balance(self, key: ApiKey) -> str:
        shard = self._gateway.settings.shard_of(key.account_id)
        return await ask(
            self._gateway.nc, subjects.billing(shard, "balance"),
            BalanceRequest(account_id=key.account_id), self._gateway.settings.rpc_timeout_s,
        )  # fmt: skip

    def _plaintext_refused(self, request: Request) -> BadRequest:
        address = self._gateway.settings.public_url
        if not address:
            host = request.headers.get(b"host", b"")
            shown = host.decode() if _HOST.match(host) else "127.0.0.1"
            address = f"{request.scope.get('scheme', 'http')}://{shown}"
        return BadRequest(
            "This gateway takes sealed requests only and has not read this one. Run "
            f"`./cocoon connect --gateway {address}` and use the base_url that it prints: it seals "
            "every request on your own machine.",
            code="plaintext_refused",
        )


def bus_told(settings: GatewaySettings) -> dict[str, object]:
    """Where providers reach the bus, and the authority that its certificates come from (PEM).

    Raises ConfigurationError if the authority's file cannot be read.
    """
    if settings.bus_ca_file is None:
        return {"urls": list(settings.bus_urls), "ca_pem": None, "ca_sha256": None}
    try:
        pem = settings.bus_ca_file.read_text(encoding="ascii")
        der = ssl.PEM_cert_to_DER_cert(pem)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"{settings.bus_ca_file} does not hold a certificate in PEM; name the authority of the "
            "bus's certificates"
        ) from None
    digest = hashlib.sha256(der).hexdigest()
    return {"urls": list(settings.bus_urls), "ca_pem": pem, "ca_sha256": digest}


def _check_method(method: str, path: str) -> None:
    """Raise MethodNotAllowed for an address that exists and knows no such method."""
    job = _JOB_PATH.match(path)
    if job is not None:
        allowed = {"": "GET, DELETE", "/dispute": "POST"}.get(job[1] or "", "GET")
    elif path in _READS or path.startswith(_MANIFESTS):
        allowed = "GET"
    else:
        allowed = "POST" if path == "/v1/jobs" else method
    if method not in allowed.split(", "):
        raise MethodNotAllowed(f"this address knows {allowed} only", allowed=allowed)


def _media_type(request: Request) -> bytes:
    return request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def _wanted_model(request: Request) -> str:
    try:
        fields = parse_qs(request.query.decode("ascii"), max_num_fields=8)
    except ValueError:
        fields = {}
    names = fields.get("model", [])
    if len(names) != 1 or _MODEL.match(names[0]) is None:
        raise BadRequest("name one model: /v1/directory?model=NAME", param="model")
    return names[0]
