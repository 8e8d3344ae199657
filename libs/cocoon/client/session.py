"""A sealed session with a network: verify, seal, send, open, and refuse what lacks a receipt.

Neither the gateway nor this module's logs see content. Time and randomness are injected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from cocoon.chat import ENDPOINT, ChatRequest, parse_chat_request
from cocoon.client.answers import Settlement, StreamShaper, enclave_error, whole_body
from cocoon.client.bounds import token_bounds
from cocoon.client.checks import check_answer, check_provider
from cocoon.client.choice import Candidate, choose, one_model, with_assurance
from cocoon.client.directory import Directory
from cocoon.client.exchange import Exchange
from cocoon.client.gateway import Gateway
from cocoon.client.trace import child_traceparent
from cocoon.domain.pricing import greatest_price
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import BadRequest, Conflict
from cocoon.sealing import (
    Data,
    ErrorRecord,
    Finished,
    Profile,
    Recipient,
    RequestHeader,
    SealedRequest,
    Usage,
    latest_not_after_ms,
    pack_flags,
    seal_request,
)

REQUEST_TTL_MS: Final = 10 * 60 * 1000
MAX_KEY_CHARS: Final = 255


@dataclass(frozen=True, slots=True)
class Preferences:
    """What the caller accepts: tiers, padding, money (nanoTON for one request) and spread."""

    assurances: Collection[Assurance]
    body_profile: Profile = Profile.P0
    stream_profile: Profile = Profile.P2
    max_price_nanoton: int | None = None


@dataclass(frozen=True, slots=True)
class Began:
    """Somebody answers. Nothing is proven before `Ended`."""

    job_id: str
    provider_id: str
    max_cost_nanoton: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One OpenAI chunk (JSON bytes) of a stream, authentic and in order."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """The checked end. `body` is the whole answer where it was not streamed."""

    settlement: Settlement
    body: bytes | None = field(default=None, repr=False)


Piece = Began | Chunk | Ended


@dataclass(frozen=True, slots=True)
class _Sealing:
    """One sealed form of a request: a reseal makes another, with another job id."""

    sealed: SealedRequest
    by_key_id: dict[bytes, Candidate]
    max_price_nanoton: int
    idempotency_key: str


class Job:
    """One request, sealed. `run` may be called again after a failure: it stays the same job."""

    def __init__(
        self, session: SealedSession, request: ChatRequest, body: bytes, sealing: _Sealing, *,
        api_key: str, key: str | None, traceparent: str,
    ) -> None:  # fmt: skip
        self._session = session
        self._request = request
        self._body = body
        self._sealing = sealing
        self._api_key = api_key
        self._key = key
        self._traceparent = traceparent
        self._resealed = False

    @property
    def job_id(self) -> str:
        """32 hex digits; another one after the gateway asked for a reseal."""
        return self._sealing.sealed.secrets.header.job_id.hex()

    @property
    def stream(self) -> bool:
        return bool(self._request.stream)

    async def run(self) -> AsyncGenerator[Piece, None]:
        """Send, open and check. Yields Began, chunks of a stream, then Ended.

        Raises the tree's errors; after content of a stream came they end it without its last
        chunk. Closing the generator closes the line, which cancels the job.
        """
        try:
            async with aclosing(self._attempt()) as pieces:
                async for piece in pieces:
                    yield piece
            return
        except Conflict as error:
            if error.code != "reseal" or self._resealed:
                raise
        self._resealed = True
        self._sealing = await self._session.seal(
            self._request, self._body, self._api_key, key=self._key, refresh=True
        )
        async with aclosing(self._attempt()) as pieces:
            async for piece in pieces:
                yield piece

    async def _attempt(self) -> AsyncGenerator[Piece, None]:
        sealing = self._sealing
        exchange = Exchange(
            self._session.gateway, sealing.sealed, sealing.by_key_id, api_key=self._api_key,
            idempotency_key=sealing.idempotency_key, traceparent=self._traceparent,
        )  # fmt: skip
        shaper = StreamShaper(include_usage=self._request.include_usage)
        content = bytearray()
        usage: bytes | None = None
        failed: bytes | None = None
        began = False
        async with aclosing(exchange.events()) as events:
            async for event in events:
                if not began:
                    began = True
                    check_provider(sealing.by_key_id[exchange.key_id], exchange.match)
                    yield Began(self.job_id, exchange.match.provider_id, sealing.max_price_nanoton)
                if isinstance(event, Data):
                    if not self.stream:
                        content += event.content
                    elif (shown := shaper.take(event.content)) is not None:
                        yield Chunk(shown)
                elif isinstance(event, Usage):
                    usage = event.content
                elif isinstance(event, ErrorRecord):
                    failed = event.content
                else:
                    settlement = _settle(event, exchange, sealing, usage)
                    error = enclave_error(settlement.receipt, failed)
                    if error is not None:
                        raise error
                    if self.stream:
                        for chunk in shaper.finish(settlement, usage):
                            yield Chunk(chunk)
                        yield Ended(settlement)
                    else:
                        yield Ended(settlement, whole_body(bytes(content), settlement))


def _settle(
    finished: Finished, exchange: Exchange, sealing: _Sealing, usage: bytes | None
) -> Settlement:
    candidate = check_answer(
        finished.receipt, exchange.match, header=sealing.sealed.secrets.header,
        by_key_id=sealing.by_key_id, usage=usage,
    )  # fmt: skip
    return Settlement(
        job_id=exchange.job_id,
        provider_id=candidate.provider_id,
        model_id=finished.receipt.model_id.hex(),
        assurance=candidate.assurance.value,
        receipt=finished.receipt,
        receipt_raw=finished.raw,
    )


class SealedSession:
    """Everything a client needs to ask one network. Holds no key but the ones it is handed."""

    def __init__(
        self, gateway: Gateway, directory: Directory, preferences: Preferences, *, clock: Clock,
        randomness: Randomness,
    ) -> None:  # fmt: skip
        self.gateway = gateway
        self._directory = directory
        self._preferences = preferences
        self._clock = clock
        self._randomness = randomness

    async def prepare(
        self, body: bytes, *, api_key: str, endpoint: str = ENDPOINT,
        idempotency_key: str | None = None, traceparent: str | None = None,
    ) -> Job:  # fmt: skip
        """Check a request, choose its providers and seal it. Nothing is sent but look-ups.

        Raises BadRequest for what OpenAI's contract refuses, NotFound for an unknown model,
        EvidenceRejected when no provider passes the checks, and the gateway's errors.
        """
        if endpoint != ENDPOINT:
            raise BadRequest(f"Only {ENDPOINT} is sealed here.", code="unknown_endpoint")
        if idempotency_key is not None:
            _check_key(idempotency_key)
        request = parse_chat_request(body)
        sealing = await self.seal(request, body, api_key, key=idempotency_key)
        return Job(
            self, request, body, sealing, api_key=api_key, key=idempotency_key,
            traceparent=child_traceparent(traceparent, self._randomness),
        )  # fmt: skip

    async def complete(
        self, body: bytes, *, api_key: str, endpoint: str = ENDPOINT,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
        """Yield a stream's decoded chunks, or the one decoded answer. Raises what `run` raises."""
        job = await self.prepare(
            body, api_key=api_key, endpoint=endpoint, idempotency_key=idempotency_key
        )
        async with aclosing(job.run()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Chunk):
                    yield json.loads(piece.content)
                elif isinstance(piece, Ended) and piece.body is not None:
                    yield json.loads(piece.body)

    async def seal(
        self, request: ChatRequest, body: bytes, api_key: str, *, key: str | None,
        refresh: bool = False,
    ) -> _Sealing:  # fmt: skip
        """Choose and seal. `refresh`: the gateway asked for it, so its directory is read again."""
        listing = await self._directory.listing(request.model, api_key, refresh=refresh)
        now_ms = self._clock.now_ms()
        wanted = self._preferences
        able = one_model(with_assurance(listing.usable(now_ms), wanted.assurances))
        bounds = token_bounds(request, max(item.context_tokens for item in able))
        chosen = choose(
            able, max_input_tokens=bounds.max_input_tokens,
            max_output_tokens=bounds.max_output_tokens,
            max_price_nanoton=wanted.max_price_nanoton, randomness=self._randomness,
        )  # fmt: skip
        max_price = max(
            greatest_price(item.quote, bounds.max_input_tokens, bounds.max_output_tokens)
            for item in chosen
        )
        stream = bool(request.stream)
        profile = wanted.stream_profile if stream else wanted.body_profile
        last_ms = latest_not_after_ms(item.bundle for item in chosen)
        header = RequestHeader(
            job_id=self._randomness.token(16),
            model_id=bytes.fromhex(chosen[0].quote.model_id),
            max_price_nanoton=max_price,
            max_input_tokens=bounds.max_input_tokens,
            max_output_tokens=bounds.max_output_tokens,
            not_after_ms=min(now_ms + REQUEST_TTL_MS, last_ms),
            policy_hash=listing.policy_hash,
            flags=pack_flags(profile, stream=stream),
        )
        sealed = seal_request(
            header=header,
            recipients=[Recipient.of(item.bundle.x25519_pk) for item in chosen],
            endpoint=ENDPOINT,
            body=body,
            randomness=self._randomness,
        )
        return _Sealing(
            sealed=sealed,
            by_key_id={item.bundle.key_id: item for item in chosen},
            max_price_nanoton=max_price,
            idempotency_key=_outer_key(key, header.job_id.hex(), resealed=refresh),
        )


def _check_key(key: str) -> None:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not all("!" <= char <= "~" for char in key):
        raise BadRequest(
            "An Idempotency-Key is 1 to 255 visible ASCII characters.",
            param="Idempotency-Key",
            code="invalid_idempotency_key",
        )


def _outer_key(key: str | None, job_id: str, *, resealed: bool) -> str:
    """The key that the gateway sees: a hash of the caller's, or the job's own id.

    A reseal is another job, so it is another key; the first ended before it began.
    """
    if key is None:
        return job_id
    hashed = hashlib.sha256(b"cocoon idempotency key\0" + key.encode()).hexdigest()
    return f"{hashed}.resealed" if resealed else hashed
