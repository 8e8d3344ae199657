"""API keys at the door: a bounded cache over the table, emptied the moment a key changes.

A key's text is hashed at once and never kept; the look-up is by the hash, so its time says nothing
about the text. Operators' requests (create, list, revoke) are answered here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from pydantic import ValidationError

from cocoon.contracts.messages import CreateKeyRequest, ErrorBody, Reply, RevokeKeyRequest
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import BadRequest, CocoonError, Unauthenticated, Unavailable
from cocoon.kernel.ids import API_KEY_FORM
from cocoon.telemetry.logs import get_logger
from services.gateway import store
from services.gateway.store import ApiKey

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("cocoon.gateway.keys")
MAX_CACHED: Final = 20_000
MAX_UNKNOWN: Final = 4_096  # apart, so that guesses push no live key out
MAX_LOOKUPS: Final = 64  # of keys never seen live; as many of those that were, apart from them
RENEW_AFTER: Final = 0.5  # of a live key's time in the cache: from then on a use renews it
UNKNOWN_TTL_S: Final = 2.0
_T = TypeVar("_T")
_BEARER: Final = re.compile(rf"[Bb]earer ({API_KEY_FORM})\Z".encode())


class _Live(NamedTuple):
    """A key found live; monotonic seconds. Past `until_s` it only tells that it was live."""

    renew_at_s: float
    until_s: float
    key: ApiKey


class KeyRing:
    """Authenticates requests. Its caches are used only while changes are heard.

    A revoked key is refused as soon as the database tells (at once), within ten seconds if the
    connection that hears it died silently, and after `ttl_s` whatever happens. One in use is
    renewed before its time is over, and serves meanwhile.
    """

    def __init__(self, pool: Pool, lookup_pool: Pool, clock: Clock, ttl_s: float) -> None:
        self._pool, self._lookup_pool = pool, lookup_pool
        self._clock, self._ttl_s = clock, ttl_s
        self._live: OrderedDict[bytes, _Live] = OrderedDict()
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Task[ApiKey | None]] = {}
        self._running: set[asyncio.Task[ApiKey | None]] = set()  # of keys never seen live
        self._renewing: set[asyncio.Task[ApiKey | None]] = set()  # of those that were
        self._hearing = False

    @property
    def hearing(self) -> bool:
        return self._hearing

    def on_change(self, secret_hash: bytes) -> None:
        self._live.pop(secret_hash, None)
        self._unknown.pop(secret_hash, None)
        self._lookups.pop(secret_hash, None)  # it began before the change, so nobody else joins it

    def on_state(self, hearing: bool) -> None:
        self._hearing = hearing
        for known in (self._live, self._unknown, self._lookups):
            known.clear()

    async def authenticate(self, authorization: bytes | None) -> ApiKey:
        """The live key of an Authorization header. Raises Unauthenticated or Unavailable."""
        if authorization is None:
            raise Unauthenticated(
                "send your API key as `Authorization: Bearer ck_...`; make one with "
                "`./cocoon keys create`",
                code="missing_api_key",
            )
        found = _BEARER.match(authorization)
        if found is None:
            raise Unauthenticated(
                "this is not an API key of Cocoon; a key is ck_ and 43 letters, digits, - or _"
            )
        secret_hash = hashlib.sha256(found[1]).digest()
        now_s = self._clock.monotonic_s()
        cached = self._live.get(secret_hash)
        if cached is not None and cached.until_s > now_s:
            if now_s >= cached.renew_at_s:
                with contextlib.suppress(Unavailable):  # it is usable until its time has come
                    self._look_up(secret_hash)
            return cached.key
        key = None
        if self._unknown.get(secret_hash, now_s) <= now_s:
            key = await asyncio.shield(self._look_up(secret_hash))
        if key is None:
            raise Unauthenticated(
                "this API key is unknown or revoked; ask the operator for a new one "
                "(`./cocoon keys create`)"
            )
        return key

    def _look_up(self, secret_hash: bytes) -> asyncio.Task[ApiKey | None]:
        """Ask the database, once for all that ask for the same key meanwhile. Raises Unavailable.

        Guesses fill their own places only: a key that was live here has others.
        """
        task = self._lookups.get(secret_hash)
        if task is None:
            places = self._renewing if secret_hash in self._live else self._running
            if len(places) >= MAX_LOOKUPS:
                raise Unavailable("too many API keys are being checked; try again", retry_after_s=1)
            task = asyncio.create_task(store.find_key(self._lookup_pool, secret_hash))
            self._lookups[secret_hash] = task
            places.add(task)
            now_s = self._clock.monotonic_s()
            task.add_done_callback(lambda done: self._looked_up(secret_hash, done, now_s))
        return task

    def _looked_up(
        self, secret_hash: bytes, task: asyncio.Task[ApiKey | None], asked_s: float
    ) -> None:
        self._running.discard(task)
        self._renewing.discard(task)
        current = self._lookups.get(secret_hash) is task  # else the key has changed since
        if current:
            del self._lookups[secret_hash]
        if task.cancelled() or task.exception() is not None or not (current and self._hearing):
            return
        key = task.result()
        if key is None:
            self._live.pop(secret_hash, None)
            _remember(
                self._unknown, secret_hash, asked_s + min(self._ttl_s, UNKNOWN_TTL_S), MAX_UNKNOWN
            )
        else:
            live = _Live(asked_s + self._ttl_s * RENEW_AFTER, asked_s + self._ttl_s, key)
            _remember(self._live, secret_hash, live, MAX_CACHED)

    async def close(self) -> None:
        running = [*self._running, *self._renewing]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # ---- operators ----

    async def do_create_key(self, body: bytes) -> str:
        request = CreateKeyRequest.model_validate_json(body)
        secret_hash = bytes.fromhex(request.secret_hash)
        await store.create_key(
            self._pool, request.api_key_id, secret_hash, request.account_id, request.label
        )
        self.on_change(secret_hash)
        return json.dumps({"api_key_id": request.api_key_id, "account_id": request.account_id})

    async def do_list_keys(self, _body: bytes) -> str:
        return json.dumps({"keys": await store.list_keys(self._pool)})

    async def do_revoke_key(self, body: bytes) -> str:
        request = RevokeKeyRequest.model_validate_json(body)
        secret_hash, revoked_ms, before = await store.revoke_key(self._pool, request.api_key_id)
        self.on_change(secret_hash)
        return json.dumps(
            {
                "api_key_id": request.api_key_id,
                "revoked": True,
                "revoked_ms": revoked_ms,
                "revoked_before": before,
            }
        )


def _remember(known: OrderedDict[bytes, _T], secret_hash: bytes, value: _T, limit: int) -> None:
    known[secret_hash] = value
    known.move_to_end(secret_hash)
    if len(known) > limit:
        known.popitem(last=False)


async def answer(do: Callable[[bytes], Awaitable[str]], body: bytes) -> Reply:
    """Run an operator's request and put its outcome into a Reply."""
    try:
        return Reply(ok=True, data=await do(body))
    except ValidationError:
        error: CocoonError = BadRequest("the request does not have this command's fields")
    except CocoonError as caught:
        error = caught
    except Exception:
        log.exception("key_request_failed")
        error = CocoonError("the gateway failed; read its log")
    return Reply(
        ok=False,
        error=ErrorBody(
            status=error.http_status,
            code=error.code,
            message=error.message[:1000],
            retry_after_s=error.retry_after_s,
        ),
    )
