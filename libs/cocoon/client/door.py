"""OpenAI's HTTP API, locally: one request in, one answer out, sealed in between.

The sidecar and the in-process transports are two shells around it. Logs ids, never content.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from cocoon.chat import COMPLETIONS, EMBEDDINGS, ENDPOINT, KINDS, error_body, to_json
from cocoon.client.answers import SSE_DONE, sse_event
from cocoon.client.job import Began, Chunk, Ended
from cocoon.client.manifests import MANIFESTS_PATH, fetch_manifest
from cocoon.client.recording import Head
from cocoon.client.repeats import Asked, Entry, Repeats
from cocoon.client.session import SealedSession
from cocoon.client.wishes import TIERS_HEADER, with_tiers
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import (
    CocoonError,
    NotFound,
    TooLarge,
    Transient,
    Unauthenticated,
    Unavailable,
)
from cocoon.kernel.ids import is_api_key
from cocoon.telemetry.tracing import annotate, span

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
_JSON: Final = ("content-type", "application/json")
_SSE: Final = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
)
_SPANS: Final = {
    ENDPOINT: "client.chat", COMPLETIONS: "client.complete", EMBEDDINGS: "client.embed",
}  # fmt: skip
_log = logging.getLogger("cocoon.client")


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """One HTTP request. Header names are lower-case; the body is whole."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class LocalAnswer:
    """One HTTP answer. Read `parts` to the end or close it: that is how a caller leaves."""

    def __init__(
        self, head: Head, parts: AsyncIterator[bytes], leave: Callable[[], None] | None = None
    ) -> None:
        self.status = head.status
        self.headers = head.headers
        self.parts = parts
        self._leave = leave

    def close(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


class Door:
    """Routes local requests. `api_key` pays for a caller that presents no gateway key of its own.

    local_key: what a caller must present as its bearer token, where it is given.
    """

    def __init__(
        self, session: SealedSession, *, clock: Clock, api_key: str | None = None,
        local_key: str | None = None,
    ) -> None:  # fmt: skip
        self._session = session
        self._api_key = api_key
        self._local_key = local_key
        self._repeats = Repeats(self._work, clock=clock)

    async def answer(self, request: LocalRequest) -> LocalAnswer:
        """Never raises for a bad request: errors are answers in OpenAI's form."""
        try:
            return await self._route(request)
        except CocoonError as error:
            return error_answer(error)

    async def aclose(self) -> None:
        """Cancel running jobs."""
        await self._repeats.aclose()

    async def _route(self, request: LocalRequest) -> LocalAnswer:
        path = request.path.rstrip("/")
        if path == "/healthz":
            return _allow(request, "GET") or _json_answer(b'{"status":"ok"}')
        caller = self._authenticate(request)
        if path in KINDS:
            return _allow(request, "POST") or await self._sealed(path, request, caller)
        if path == "/v1/models":
            return _allow(request, "GET") or _json_answer(to_json(await self._models(caller)))
        if path.startswith("/v1/models/"):
            return _allow(request, "GET") or await self._model(unquote(path[11:]), caller)
        if path.startswith(MANIFESTS_PATH):
            return _allow(request, "GET") or await self._manifest(path)
        raise NotFound(
            f"Unknown path: {request.method} {request.path[:200]}. This endpoint serves "
            f"{', '.join(KINDS)} and /v1/models.",
            code="unknown_url",
        )

    def _authenticate(self, request: LocalRequest) -> str:
        """Return the key for the gateway. Raises Unauthenticated for a wrong local key."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if self._local_key is not None and not hmac.compare_digest(
            token.encode(), self._local_key.encode()
        ):
            raise Unauthenticated(
                "The local key is wrong; use the one that the sidecar was started with."
            )
        if self._api_key is None or (self._local_key is None and is_api_key(token)):
            return token  # the caller's own account pays; the gateway refuses a key it never made
        return self._api_key

    async def _models(self, api_key: str) -> dict[str, object]:
        found = await self._session.gateway.json("/v1/models", api_key)
        data = found.get("data")
        return {"object": "list", "data": data if isinstance(data, list) else []}

    async def _model(self, name: str, api_key: str) -> LocalAnswer:
        models = (await self._models(api_key))["data"]
        assert isinstance(models, list)  # noqa: S101 - _models made it one
        for model in models:
            if isinstance(model, dict) and model.get("id") == name:
                return _json_answer(to_json(model))
        raise NotFound(
            f"The model {name[:128]!r} does not exist here.", param="model", code="model_not_found"
        )

    async def _manifest(self, path: str) -> LocalAnswer:
        """The gateway's, but only if it hashes to the id."""
        model_id = path.removeprefix(MANIFESTS_PATH)
        manifest = await fetch_manifest(self._session.gateway, model_id)
        return _json_answer(manifest.to_canonical())

    async def _sealed(self, endpoint: str, request: LocalRequest, caller: str) -> LocalAnswer:
        if len(request.body) > MAX_BODY_BYTES:
            raise TooLarge(f"A request's body is at most {MAX_BODY_BYTES} bytes; send less.")
        headers = request.headers
        asked = Asked(
            body=with_tiers(request.body, headers.get(TIERS_HEADER)),
            caller=caller,
            key=headers.get("idempotency-key"),
            retry=_retry_count(headers.get("x-stainless-retry-count")),
            traceparent=headers.get("traceparent"),
            endpoint=endpoint,
        )
        entry, reading = self._repeats.open(asked)
        try:
            head = await reading.head()
        except BaseException:
            self._repeats.leave(entry, reading)
            raise
        return LocalAnswer(head, reading, lambda: self._repeats.leave(entry, reading))

    async def _work(self, entry: Entry) -> None:
        """Produce one entry's answer into its recording, whatever happens."""
        recording = entry.recording
        try:
            with span(_SPANS[entry.asked.endpoint], entry.asked.traceparent) as current:
                await self._tell(entry)
                if entry.job is not None:
                    annotate(current, {"job_id": entry.job.job_id})
        except asyncio.CancelledError:
            if entry.job is not None and (entry.cancelled or entry.asked.key is None):
                entry.job.abandon()  # one with a key may come back after a restart
            if recording.begun:  # somebody may still read: an end must not look like an answer's
                recording.put(sse_event(error_body(_closing())))
            raise
        except CocoonError as error:
            await _tell_error(entry, error)
            if error.code == "job_failed" and entry.asked.key is None:
                entry.job = None  # it ended unpaid: a retry may be another job
        except Exception as error:  # noqa: BLE001 - a caller must never wait for ever
            _log.error("request_failed", extra={"error_class": type(error).__name__})
            await _tell_error(entry, CocoonError("The client failed; see its log."))
        finally:
            recording.end()

    async def _tell(self, entry: Entry) -> None:
        asked, recording = entry.asked, entry.recording
        if entry.job is None:
            entry.job = await self._session.prepare(
                asked.body, api_key=asked.caller, endpoint=asked.endpoint,
                idempotency_key=asked.key, traceparent=asked.traceparent,
            )  # fmt: skip
        began: Began | None = None
        async with aclosing(entry.job.bursts()) as bursts:
            async for pieces in bursts:
                told = [sse_event(piece.content) for piece in pieces if isinstance(piece, Chunk)]
                if isinstance(pieces[0], Began):
                    began = pieces[0]
                if told:
                    if not recording.begun and began is not None:
                        recording.begin(Head(200, (*_SSE, *_stream_facts(began))))
                    await recording.write(b"".join(told))
                if isinstance(pieces[-1], Ended):
                    await self._tell_end(entry, pieces[-1])

    async def _tell_end(self, entry: Entry, ended: Ended) -> None:
        recording, settlement = entry.recording, ended.settlement
        _log.debug(
            "answered",
            extra={"job_id": settlement.job_id, "price_nanoton": settlement.cost_nanoton},
        )
        if ended.body is None:
            if not recording.begun:
                recording.begin(Head(200, _SSE))  # a stream that says nothing
            await recording.write(SSE_DONE)
            return
        facts = (
            ("x-cocoon-job-id", settlement.job_id),
            ("x-cocoon-provider", settlement.provider_id),
            ("x-cocoon-model-id", settlement.model_id),
            ("x-cocoon-tier", settlement.assurance),
            ("x-cocoon-cost-nanoton", str(settlement.cost_nanoton)),
        )
        recording.begin(Head(200, (_JSON, *facts, ("content-length", str(len(ended.body))))))
        await recording.write(ended.body)


def _stream_facts(began: Began) -> tuple[tuple[str, str], ...]:
    return (
        ("x-cocoon-job-id", began.job_id),
        ("x-cocoon-provider", began.provider_id),
        ("x-cocoon-model-id", began.model_id),
        ("x-cocoon-tier", began.assurance),
        ("x-cocoon-max-cost-nanoton", str(began.max_cost_nanoton)),
    )


async def _tell_error(entry: Entry, error: CocoonError) -> None:
    """An error before content is an HTTP answer; later it is the stream's last event."""
    recording = entry.recording
    if recording.begun:
        await recording.write(sse_event(error_body(error)))
        return
    job = () if entry.job is None else (("x-cocoon-job-id", entry.job.job_id),)
    head, body = error_head(error)
    recording.begin(Head(head.status, (*head.headers, *job)), failed=True)
    await recording.write(body)


def error_head(error: CocoonError) -> tuple[Head, bytes]:
    """An error as an HTTP answer. Only what may succeed later invites an SDK to try again."""
    body = error_body(error)
    headers = [_JSON, ("content-length", str(len(body)))]
    if error.retry_after_s is not None:
        headers.append(("retry-after", str(error.retry_after_s)))
    if not isinstance(error, Transient):
        headers.append(("x-should-retry", "false"))
    return Head(error.http_status, tuple(headers)), body


def error_answer(error: CocoonError) -> LocalAnswer:
    head, body = error_head(error)
    return LocalAnswer(head, _Once(body))


def _json_answer(body: bytes) -> LocalAnswer:
    return LocalAnswer(Head(200, (_JSON, ("content-length", str(len(body))))), _Once(body))


def _allow(request: LocalRequest, method: str) -> LocalAnswer | None:
    """405 for another method than the path's."""
    if request.method == method:
        return None
    body = to_json({
        "error": {
            "message": f"Use {method} for this path.",
            "type": "invalid_request_error",
            "param": None,
            "code": "method_not_allowed",
        }
    })  # fmt: skip
    headers = (_JSON, ("content-length", str(len(body))), ("allow", method))
    return LocalAnswer(Head(405, headers), _Once(body))


def _closing() -> CocoonError:
    return Unavailable("The client is closing; the answer is not whole.", code="client_closed")


class _Once:
    """An answer's one part, without a generator to clean up."""

    def __init__(self, body: bytes) -> None:
        self._left = [body]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


def _retry_count(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 5 else None
