"""API keys at the door: a bounded cache over the table, emptied the moment a key changes.

A key's text is hashed at once and never kept; the look-up is by the hash, so its time says nothing
about the text. Operators' requests (create, list, revoke) are answered here too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from cocoon.contracts.messages import CreateKeyRequest, ErrorBody, Reply, RevokeKeyRequest
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import BadRequest, CocoonError, Unauthenticated, Unavailable
from cocoon.telemetry.logs import get_logger
from services.gateway import store
from services.gateway.store import ApiKey

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("cocoon.gateway.keys")
MAX_CACHED: Final = 20_000
MAX_LOOKUPS: Final = 64
UNKNOWN_TTL_S: Final = 2.0
_BEARER: Final = re.compile(rb"[Bb]earer (ck_[A-Za-z0-9_-]{43})\Z")


class KeyRing:
    """Authenticates requests. Its cache is used only while changes are heard."""

    def __init__(self, pool: Pool, clock: Clock, ttl_s: float) -> None:
        self._pool, self._clock, self._ttl_s = pool, clock, ttl_s
        self._cache: OrderedDict[bytes, tuple[float, ApiKey | None]] = OrderedDict()
        self._hearing = False
        self._changes = 0  # a look-up that began before a change is not cached
        self._lookups = 0

    @property
    def hearing(self) -> bool:
        return self._hearing

    def on_change(self, secret_hash: bytes) -> None:
        self._changes += 1
        self._cache.pop(secret_hash, None)

    def on_state(self, hearing: bool) -> None:
        self._hearing = hearing
        self._changes += 1
        self._cache.clear()

    async def authenticate(self, authorization: bytes | None) -> ApiKey:
        """The live key of an Authorization header. Raises Unauthenticated or Unavailable."""
        if authorization is None:
            raise Unauthenticated(
                "send your API key as `Authorization: Bearer ck_...`; make one with "
                "`cocoon keys create`",
                code="missing_api_key",
            )
        found = _BEARER.match(authorization)
        if found is None:
            raise Unauthenticated(
                "this is not an API key of Cocoon; a key is ck_ and 43 letters, digits, - or _"
            )
        secret_hash = hashlib.sha256(found[1]).digest()
        cached = self._cache.get(secret_hash)
        if cached is not None and cached[0] > self._clock.monotonic_s():
            key = cached[1]
        else:
            key = await self._look_up(secret_hash)
        if key is None:
            raise Unauthenticated(
                "this API key is unknown or revoked; ask the operator for a new one "
                "(`cocoon keys create`)"
            )
        return key

    async def _look_up(self, secret_hash: bytes) -> ApiKey | None:
        if self._lookups >= MAX_LOOKUPS:
            raise Unavailable("too many API keys are being checked; try again", retry_after_s=1)
        changes = self._changes
        self._lookups += 1
        try:
            key = await store.find_key(self._pool, secret_hash)
        finally:
            self._lookups -= 1
        if self._hearing and changes == self._changes:
            ttl_s = self._ttl_s if key is not None else min(self._ttl_s, UNKNOWN_TTL_S)
            self._cache[secret_hash] = (self._clock.monotonic_s() + ttl_s, key)
            self._cache.move_to_end(secret_hash)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return key

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
        self.on_change(await store.revoke_key(self._pool, request.api_key_id))
        return json.dumps({"api_key_id": request.api_key_id, "revoked": True})


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
