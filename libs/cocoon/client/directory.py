"""A model's providers, fetched whole from the gateway and believed only after local checks.

Cached for seconds and refreshed behind the callers' backs; bounded in models and providers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cocoon.client.choice import Candidate
from cocoon.client.gateway import Gateway
from cocoon.client.trust import Refused, TrustKeeper
from cocoon.contracts.base import Count, Hex32, Name, Nanoton
from cocoon.contracts.events import BasisPoints, Quote
from cocoon.evidence.policy import SignedPolicy, parse_policy
from cocoon.evidence.provider import parse_evidence
from cocoon.evidence.verdict import Assurance
from cocoon.kernel import canonical
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import (
    BadRequest,
    CocoonError,
    EvidenceRejected,
    NotFound,
    SealingError,
    Unavailable,
)
from cocoon.sealing import KeyBundle, verify_bundle

FRESH_S: Final = 3.0  # younger than this: used as it is
STALE_S: Final = 30.0  # younger than this: used while a refresh runs
EMPTY_S: Final = 0.5  # younger than this: used even if it names nobody who can be sealed to
MIN_KEY_LIFE_MS: Final = 20_000  # a key that ends sooner is not sealed to
MAX_MODELS: Final = 64
MAX_PROVIDERS: Final = 512
_SHOWN: Final = 5  # refusals and names that an error lists


class _Offer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)
    model_id: Hex32
    context_tokens: Annotated[int, Field(ge=2, le=2**31)]
    input_nanoton_per_mtok: Nanoton
    cached_input_nanoton_per_mtok: Nanoton
    output_nanoton_per_mtok: Nanoton
    fee_bps: BasisPoints = 0

    def quote(self) -> Quote:
        return Quote(
            model_id=self.model_id,
            input_nanoton_per_mtok=self.input_nanoton_per_mtok,
            cached_input_nanoton_per_mtok=self.cached_input_nanoton_per_mtok,
            output_nanoton_per_mtok=self.output_nanoton_per_mtok,
            fee_bps=self.fee_bps,
        )


class _Load(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    running: Count = 0
    concurrency: Count = 1


class _Entry(BaseModel):
    """One provider as the gateway lists it; unknown fields are other versions' business."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)
    provider_id: Name
    tier: Annotated[str, Field(max_length=32)] | None = None  # what others say; never believed
    evidence: dict[str, Any]
    bundles: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{2,8192}$")], ...], Field(max_length=8)
    ] = ()
    offer: _Offer
    load: _Load = _Load()
    quantisation: Name | None = None
    region: Name | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """A model's verified candidates, and who failed which check."""

    model: str
    policy_hash: bytes
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    fetched_s: float  # monotonic
    open_job_nanoton: int | None = None  # the most that one job may cost in the open tier

    def alive(self, now_ms: int) -> list[Candidate]:
        """Candidates whose key and evidence last long enough for a new request, maybe none."""
        return [item for item in self.candidates if item.ends_ms >= now_ms + MIN_KEY_LIFE_MS]

    def usable(self, now_ms: int) -> list[Candidate]:
        """Like `alive`, never empty.

        Raises EvidenceRejected with every provider's code where checks left nobody, Unavailable
        where there was nobody to check or all keys have ended.
        """
        alive = self.alive(now_ms)
        if alive:
            return alive
        if self.refused:
            listed = "; ".join(
                f"{item.provider_id}: {item.code} ({item.sentence})"
                for item in self.refused[:_SHOWN]
            )
            more = len(self.refused) - _SHOWN
            raise EvidenceRejected(
                f"No provider of {self.model!r} passed this client's checks; nothing was sent. "
                f"{listed}" + (f"; and {more} more" if more > 0 else ""),
                code=self.refused[0].code,
            )
        raise Unavailable(
            f"No provider of {self.model!r} has a current key; try again shortly.",
            code="no_provider",
            retry_after_s=2,
        )


class Directory:
    """Listings by model. One fetch per model at a time; close it to end its refreshes."""

    def __init__(
        self, gateway: Gateway, keeper: TrustKeeper, *, clock: Clock,
        model_pins: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._gateway = gateway
        self._keeper = keeper
        self._clock = clock
        self._pins = dict(model_pins or {})
        self._listings: OrderedDict[str, Listing] = OrderedDict()
        self._fetches: dict[tuple[str, str], asyncio.Task[Listing]] = {}

    async def listing(self, model: str, api_key: str, *, refresh: bool = False) -> Listing:
        """The model's listing, at most 30 s old. `refresh` asks the gateway again first.

        One that names nobody who can be sealed to any more is asked for again, too.

        Raises NotFound (with what is offered), EvidenceRejected for the policy, or the gateway's
        error.
        """
        known = self._listings.get(model)
        age_s = STALE_S if known is None else self._clock.monotonic_s() - known.fetched_s
        if known is not None and not (age_s < EMPTY_S or known.alive(self._clock.now_ms())):
            refresh = True
        if known is not None and not refresh and age_s < STALE_S:
            self._listings.move_to_end(model)
            if age_s >= FRESH_S:
                self._fetch(model, api_key)
            return known
        return await asyncio.shield(self._fetch(model, api_key))

    async def aclose(self) -> None:
        """End the refreshes that still run."""
        running = list(self._fetches.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _fetch(self, model: str, api_key: str) -> asyncio.Task[Listing]:
        asked = (model, api_key)  # one caller's bad key is not another's error
        task = self._fetches.get(asked)
        if task is None:
            task = asyncio.create_task(self._load(model, api_key))
            self._fetches[asked] = task
            task.add_done_callback(lambda done: self._done(asked, done))
        return task

    def _done(self, asked: tuple[str, str], task: asyncio.Task[Listing]) -> None:
        self._fetches.pop(asked, None)
        if task.cancelled() or task.exception() is not None:
            return  # whoever waits gets the error; a refresh behind a caller's back may fail
        model = asked[0]
        self._listings[model] = task.result()
        self._listings.move_to_end(model)
        while len(self._listings) > MAX_MODELS:
            self._listings.popitem(last=False)

    async def _load(self, model: str, api_key: str) -> Listing:
        try:
            found = await self._gateway.json("/v1/directory", api_key, params={"model": model})
        except (NotFound, BadRequest):  # unknown, or no name that a model could have
            raise await self._unknown_model(model, api_key) from None
        policy = _policy(found.get("policy"))
        policy_hash = self._keeper.accept_policy(policy)
        entries = found.get("providers")
        if not isinstance(entries, list):
            raise Unavailable("The gateway's directory lists no providers; check its address.")
        if not entries:
            names = await self._offered(api_key)
            if names is not None and model not in names:
                raise _not_offered(model, names)
        # ids are free in the open tier: a crowd of them must not take the others' places here
        looked_at = sorted(entries, key=_is_listed_open)[:MAX_PROVIDERS]
        judged = await asyncio.gather(*(self._judge(entry, policy, model) for entry in looked_at))
        open_rules = policy.policy.open_rules
        return Listing(
            model=model,
            policy_hash=policy_hash,
            candidates=tuple(item for item in judged if isinstance(item, Candidate)),
            refused=tuple(item for item in judged if isinstance(item, Refused)),
            fetched_s=self._clock.monotonic_s(),
            open_job_nanoton=open_rules.max_job_nanoton if open_rules is not None else None,
        )

    async def _judge(self, raw: Any, policy: SignedPolicy, model: str) -> Candidate | Refused:
        """Check one provider's entry: evidence, whose it is, the model, the current key."""
        try:
            entry = _Entry.model_validate(raw)
            evidence = parse_evidence(canonical.dumps(entry.evidence))
        except (ValidationError, ValueError, EvidenceRejected):
            return Refused(_name(raw), "malformed", "Its directory entry cannot be read.")
        if evidence.provider_id != entry.provider_id:
            return Refused(entry.provider_id, "nonce", "The evidence is another provider's.")
        attested = await self._keeper.judge(evidence, policy)
        if isinstance(attested, Refused):
            return attested
        if _is_lifted(entry.tier, attested.assurance):
            return Refused(
                entry.provider_id, "tier_lifted",
                f"The directory calls it {entry.tier}; its evidence shows "
                f"{attested.assurance.value}.",
            )  # fmt: skip
        if entry.offer.model_id not in attested.models:
            return Refused(
                entry.provider_id, "models_mismatch", "The offered model is not an attested one."
            )
        if self._pins.get(model, entry.offer.model_id) != entry.offer.model_id:
            return Refused(
                entry.provider_id, "model_pin", "The offered model is not the one pinned here."
            )
        now_ms = self._clock.now_ms()
        if attested.valid_until_ms <= now_ms:
            return Refused(entry.provider_id, "too_old", "Its evidence has run out.")
        bundle = _current_bundle(entry.bundles, attested.signing_key, attested.evidence_id, now_ms)
        if isinstance(bundle, str):
            return Refused(entry.provider_id, bundle, "It has no valid current key.")
        return Candidate(
            provider_id=entry.provider_id,
            signing_key=attested.signing_key,
            assurance=attested.assurance,
            bundle=bundle,
            quote=entry.offer.quote(),
            context_tokens=entry.offer.context_tokens,
            running=entry.load.running,
            concurrency=_places(entry.load.concurrency, attested.assurance, policy),
            valid_until_ms=attested.valid_until_ms,
            quantisation=entry.quantisation,
            region=entry.region,
        )

    async def _unknown_model(self, model: str, api_key: str) -> NotFound | Unavailable:
        return _not_offered(model, await self._offered(api_key) or ())

    async def _offered(self, api_key: str) -> tuple[str, ...] | None:
        try:
            models = (await self._gateway.json("/v1/models", api_key)).get("data")
        except CocoonError:
            return None
        return tuple(str(item.get("id"))[:128] for item in models or () if isinstance(item, dict))


def _not_offered(model: str, names: tuple[str, ...]) -> NotFound | Unavailable:
    if not names:  # whether it exists cannot be told: its provider may come back
        return Unavailable(
            "No provider offers any model at the moment; try again shortly.",
            code="no_provider",
            retry_after_s=2,
        )
    return NotFound(
        f"The model {model[:128]!r} does not exist here. Offered: {', '.join(names[:20])}.",
        param="model",
        code="model_not_found",
    )


def _is_listed_open(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("tier") == Assurance.OPEN.value


def _is_lifted(listed: str | None, found: Assurance) -> bool:
    """Whether a listed tier is a better one than the evidence shows."""
    best_first = [item.value for item in Assurance]
    return listed in best_first and best_first.index(listed) < best_first.index(found.value)


def _places(told: int, assurance: Assurance, signed: SignedPolicy) -> int:
    """How many jobs it runs at once: in the open tier no more than the policy allows one."""
    rules = signed.policy.open_rules
    if assurance is Assurance.OPEN and rules is not None:
        return min(told, rules.max_running_jobs)
    return told


def _policy(raw: object) -> SignedPolicy:
    try:
        return parse_policy(canonical.dumps(raw))
    except ValueError:
        raise EvidenceRejected(
            "The gateway's policy cannot be read; update Cocoon or check the gateway's address.",
            code="policy_unsigned",
        ) from None


def _name(raw: object) -> str:
    name = raw.get("provider_id") if isinstance(raw, dict) else None
    return name[:64] if isinstance(name, str) and name.isascii() else "an unnamed provider"


def _current_bundle(
    bundles: tuple[str, ...], signing_key: bytes, evidence_id: bytes, now_ms: int
) -> KeyBundle | str:
    """The valid bundle that lives longest, or why there is none."""
    best: KeyBundle | None = None
    code = "expired"
    for raw in bundles:
        try:
            bundle = verify_bundle(
                bytes.fromhex(raw), ed25519_pk=signing_key, evidence_id=evidence_id, now_ms=now_ms
            )
        except (SealingError, ValueError) as error:
            code = error.code if isinstance(error, SealingError) else "malformed"
            continue
        if best is None or bundle.not_after_ms > best.not_after_ms:
            best = bundle
    return best or code
