"""A sealed session with a network: verify, choose, seal, and hand out the job that sends it.

Neither the gateway nor this module's logs see content. Time and randomness are injected.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from cocoon.chat import (
    ENDPOINT,
    KINDS,
    AnyRequest,
    ChatRequest,
    EmbeddingRequest,
    parse_request,
)
from cocoon.client.bounds import token_bounds
from cocoon.client.choice import Addressee, choose, one_model, with_assurance
from cocoon.client.counting import Counters
from cocoon.client.directory import Directory
from cocoon.client.gateway import Gateway
from cocoon.client.job import EXPIRED, LINE_BROKE, PRICE_ROSE, Chunk, Ended, Job, Sealing
from cocoon.client.kept import KeptRequest, KeptRequests
from cocoon.client.trace import child_traceparent
from cocoon.client.wishes import Affinity, fitting, split_wishes, with_tier
from cocoon.contracts.matching import Preferences as Wishes
from cocoon.domain.pricing import greatest_price
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.clock import Clock, Randomness
from cocoon.kernel.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    EvidenceRejected,
    Unavailable,
)
from cocoon.sealing import (
    Profile,
    Recipient,
    RequestHeader,
    latest_not_after_ms,
    pack_flags,
    seal_request,
)

_log = logging.getLogger("cocoon.client")
REQUEST_TTL_MS: Final = 10 * 60 * 1000
MAX_KEY_CHARS: Final = 255
# for a provider to take the place of one that was lost
REPLACED_AFTER_S: Final = (0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Preferences:
    """What the caller accepts: tiers, padding, money (nanoTON for one request) and spread.

    open_on_request: whether a request that names the open tier gets it, though it is not among
    `assurances`.
    """

    assurances: Collection[Assurance]
    open_on_request: bool = False
    body_profile: Profile = Profile.P0
    stream_profile: Profile = Profile.P2
    max_price_nanoton: int | None = None
    counters: Counters = field(default_factory=Counters)  # what counts tokens for the client
    affinity: bool = True  # tell the network a blind key of each conversation's beginning
    wishes: Wishes | None = None  # of a request that has none of its own

    def accepted(self, wishes: Wishes | None) -> frozenset[Assurance]:
        """The tiers that a request may be sealed to: open only where somebody named it."""
        asks = wishes is not None and Assurance.OPEN.value in wishes.tiers
        taken = frozenset(self.assurances)
        return taken | {Assurance.OPEN} if asks and self.open_on_request else taken


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a caller wants sealed. `name`: its Idempotency-Key's, where it has one."""

    endpoint: str
    request: AnyRequest
    body: bytes = field(repr=False)
    api_key: str = field(repr=False)
    name: str | None
    wishes: Wishes | None = None
    affinity: str = ""

    @property
    def asked(self) -> bytes:
        caller = hashlib.sha256(self.api_key.encode()).digest()
        told = b"" if self.wishes is None else hashlib.sha256(self.wishes.to_canonical()).digest()
        if self.endpoint != ENDPOINT:
            told += self.endpoint.encode()
        return hashlib.sha256(caller + hashlib.sha256(self.body).digest() + told).digest()


class SealedSession:
    """Everything a client needs to ask one network. Holds no key but the ones it is handed."""

    def __init__(
        self, gateway: Gateway, directory: Directory, preferences: Preferences, kept: KeptRequests,
        *, clock: Clock, randomness: Randomness,
    ) -> None:  # fmt: skip
        self.gateway = gateway
        self._directory = directory
        self._preferences = preferences
        self._kept = kept
        self._clock = clock
        self._randomness = randomness
        self._told_of_open = False
        self._affinity = Affinity(randomness.token(32)) if preferences.affinity else None

    async def prepare(
        self, body: bytes, *, api_key: str, endpoint: str = ENDPOINT,
        idempotency_key: str | None = None, traceparent: str | None = None,
    ) -> Job:  # fmt: skip
        """Check a request, choose its providers and seal it. Nothing is sent but look-ups.

        Raises BadRequest for what OpenAI's contract refuses, NotFound for an unknown model,
        EvidenceRejected when no provider passes the checks, and the gateway's errors.
        """
        if endpoint not in KINDS:
            raise BadRequest(f"Sealed here are {', '.join(KINDS)}.", code="unknown_endpoint")
        content, wishes = split_wishes(body)
        request = parse_request(endpoint, content)
        tier = request.service_tier if isinstance(request, ChatRequest) else None
        wishes = with_tier(wishes or self._preferences.wishes, tier)
        name = None
        if idempotency_key is not None:
            _check_key(idempotency_key)
            name = self._kept.name(api_key, idempotency_key)
        affinity = ""
        if self._affinity is not None and not isinstance(request, EmbeddingRequest):
            affinity = self._affinity.of(request, api_key, self._clock.now_ms())
        ask = _Ask(endpoint, request, content, api_key, name, wishes, affinity)
        sealing = self._earlier(ask)
        earlier = sealing is not None
        if sealing is None:
            deadline_ms = self._clock.now_ms() + REQUEST_TTL_MS
            sealing = await self._seal(ask, deadline_ms)
        return Job(
            self.gateway, request, sealing, api_key=api_key,
            traceparent=child_traceparent(traceparent, self._randomness),
            seal_again=partial(self._seal_again, ask), line_broke=earlier,
            counters=self._preferences.counters,
        )  # fmt: skip

    async def complete(
        self, body: bytes, *, api_key: str, endpoint: str = ENDPOINT,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
        """Yield a stream's decoded chunks, or the one decoded answer. Raises what `run` raises."""
        job = await self.prepare(
            body, api_key=api_key, endpoint=endpoint, idempotency_key=idempotency_key
        )
        try:
            async with aclosing(job.run()) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Chunk):
                        yield json.loads(piece.content)
                    elif isinstance(piece, Ended) and piece.body is not None:
                        yield json.loads(piece.body)
        except (GeneratorExit, asyncio.CancelledError):
            job.abandon()
            raise

    def _earlier(self, ask: _Ask) -> Sealing | None:
        """What was sealed under the same key before, here or by a process before this one.

        Raises Conflict(idempotency_mismatch) when it was another request.
        """
        kept = None if ask.name is None else self._kept.get(ask.name)
        if kept is None or ask.name is None:
            return None
        if kept.asked != ask.asked:
            raise idempotency_mismatch()
        addressees = kept.addressees()
        tiers = {item.assurance for item in addressees.values()}
        if not tiers <= self._preferences.accepted(ask.wishes):
            raise EvidenceRejected(
                "What was sealed under this Idempotency-Key is for a tier that this client no "
                "longer takes; use a new key.",
                code="assurance",
            )
        return Sealing(
            sealed=kept.sealed(),
            by_key_id=addressees,
            idempotency_key=_outer_key(ask.name, kept.again),
            deadline_ms=kept.deadline_ms,
            again=kept.again,
            headers=_headers(ask, addressees.values()),
            most_nanoton_per_mtok=_price_caps(ask),
        )

    async def _seal_again(self, ask: _Ask, before: Sealing, cause: str) -> Sealing:
        """Seal as another job, within the request's deadline, once there is somebody to seal to.

        A request that came back after its deadline, or that expired, has a new one: what was
        sealed before runs nowhere any more. The keys that did not answer are not sealed to while
        others may come: a provider that died is listed for some seconds, and its successor has
        other keys. Raises what `_seal` raises.
        """
        again = (*before.again, cause)
        header = before.sealed.secrets.header
        deadline_ms, now_ms = before.deadline_ms, self._clock.now_ms()
        if cause == EXPIRED or deadline_ms <= now_ms:
            deadline_ms = now_ms + REQUEST_TTL_MS
        for wait_s in REPLACED_AFTER_S:
            late = self._clock.now_ms() >= header.not_after_ms  # then the keys were not at fault
            same = cause in (LINE_BROKE, EXPIRED, PRICE_ROSE)
            avoid = None if same or late else header
            above = header.max_price_nanoton if cause == PRICE_ROSE else None
            try:
                return await self._seal(
                    ask, deadline_ms, again=again, avoid=avoid, above_nanoton=above
                )
            except Unavailable:
                await asyncio.sleep(wait_s)
        return await self._seal(ask, deadline_ms, again=again)

    async def _seal(
        self, ask: _Ask, deadline_ms: int, *, again: tuple[str, ...] = (),
        avoid: RequestHeader | None = None, above_nanoton: int | None = None,
    ) -> Sealing:  # fmt: skip
        """Choose and seal, and keep what a repeat after a restart needs.

        To seal again the directory is read again. Raises Unavailable when the policy and all keys
        are those of the header to avoid, or when it tells no price above `above_nanoton` yet.
        """
        request = ask.request
        listing = await self._directory.listing(request.model, ask.api_key, refresh=bool(again))
        now_ms = self._clock.now_ms()
        wanted = self._preferences
        accepted = wanted.accepted(ask.wishes)
        usable = listing.usable(now_ms)
        if avoid is not None and avoid.policy_hash == listing.policy_hash:
            usable = [item for item in usable if item.bundle.key_id not in avoid.key_ids]
            if not usable:
                raise Unavailable("No provider has a newer key; try again.", code="no_provider")
        try:
            able = one_model(fitting(with_assurance(usable, accepted), ask.wishes))
        except BadRequest as error:
            if avoid is None:
                raise  # else a successor of who is wished for may still come
            raise Unavailable(error.message, code="no_provider", retry_after_s=1) from None
        bounds = token_bounds(request, max(item.context_tokens for item in able))
        chosen = choose(
            able, max_input_tokens=bounds.max_input_tokens,
            max_output_tokens=bounds.max_output_tokens,
            max_price_nanoton=wanted.max_price_nanoton, randomness=self._randomness,
            wishes=ask.wishes, affinity=ask.affinity, open_job_nanoton=listing.open_job_nanoton,
        )  # fmt: skip
        if any(item.assurance is Assurance.OPEN for item in chosen) and not self._told_of_open:
            self._told_of_open = True
            _log.warning("open_tier_used", extra={"tier": Assurance.OPEN.value})
        max_price = max(
            greatest_price(item.quote, bounds.max_input_tokens, bounds.max_output_tokens)
            for item in chosen
        )
        if above_nanoton is not None and max_price <= above_nanoton:
            raise Unavailable("No provider tells its new price yet; try again.", code="no_provider")
        stream = bool(request.stream)
        profile = wanted.stream_profile if stream else wanted.body_profile
        not_after_ms = min(
            deadline_ms,
            latest_not_after_ms(item.bundle for item in chosen),
            *(item.valid_until_ms for item in chosen),
        )
        if not_after_ms <= now_ms:
            raise DeadlineExceeded("The request's deadline has passed; send it as a new request.")
        header = RequestHeader(
            job_id=self._randomness.token(16),
            model_id=bytes.fromhex(chosen[0].quote.model_id),
            max_price_nanoton=max_price,
            max_input_tokens=bounds.max_input_tokens,
            max_output_tokens=bounds.max_output_tokens,
            not_after_ms=not_after_ms,
            policy_hash=listing.policy_hash,
            flags=pack_flags(profile, stream=stream),
        )
        sealed = seal_request(
            header=header,
            recipients=[Recipient.of(item.bundle.x25519_pk) for item in chosen],
            endpoint=ask.endpoint,
            body=ask.body,
            randomness=self._randomness,
        )
        if ask.name is not None:
            keep = KeptRequest.of(ask.asked, deadline_ms, again, sealed, chosen)
            await self._kept.put(ask.name, keep)
        addressees = {item.bundle.key_id: item.addressee for item in chosen}
        return Sealing(
            sealed=sealed,
            by_key_id=addressees,
            idempotency_key=_outer_key(ask.name or header.job_id.hex(), again),
            deadline_ms=deadline_ms,
            again=again,
            headers=_headers(ask, addressees.values()),
            most_nanoton_per_mtok=_price_caps(ask),
        )


def _price_caps(ask: _Ask) -> tuple[int | None, int | None]:
    wishes = ask.wishes
    if wishes is None:
        return None, None
    return wishes.max_input_nanoton_per_mtok, wishes.max_output_nanoton_per_mtok


def _headers(ask: _Ask, addressees: Collection[Addressee]) -> dict[str, str]:
    """What the matcher ranks by. It is no content: ids, bounds, and a key that only we can make.

    It sends nobody to the open tier who did not name it, so it is told where this client's owner
    did, once for all requests.
    """
    found = {}
    wishes = ask.wishes
    if any(item.assurance is Assurance.OPEN for item in addressees):
        wishes = wishes or Wishes()
        if not wishes.tiers:
            tiers = {item.assurance.value for item in addressees}
            wishes = Wishes.model_validate({**wishes.model_dump(), "tiers": sorted(tiers)})
    if wishes is not None:
        found["x-cocoon-preferences"] = wishes.to_canonical().decode("ascii")
    if ask.affinity:
        found["x-cocoon-affinity"] = ask.affinity
    return found


def _check_key(key: str) -> None:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not all("!" <= char <= "~" for char in key):
        raise BadRequest(
            "An Idempotency-Key is 1 to 255 visible ASCII characters.",
            param="Idempotency-Key",
            code="invalid_idempotency_key",
        )


def _outer_key(name: str, again: tuple[str, ...]) -> str:
    """The key that the gateway sees. Another job of the same request has another key: the one
    before ended unpaid.
    """
    return f"{name}.{len(again)}" if again else name


def idempotency_mismatch() -> Conflict:
    return Conflict(
        "This Idempotency-Key was used for another request; use a new key.",
        param="Idempotency-Key",
        code="idempotency_mismatch",
    )
