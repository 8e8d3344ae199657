"""What a caller asks of its provider: OpenAI's body with a `provider` object, split before sealing.

The client holds the wishes itself, by sealing to nobody else; the network hears them only to rank
who is left. The affinity key names a conversation's beginning by a secret of this client's own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError

from cocoon.chat import ChatRequest, TextRequest
from cocoon.client.choice import Candidate
from cocoon.contracts.matching import Preferences, Priority
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import BadRequest

FIELD: Final = "provider"
AFFINITY_BYTES: Final = 4096  # of a conversation's beginning: more says nothing about its prefix
TIERS_HEADER: Final = "x-cocoon-tiers"
_TIERS: Final = tuple(item.value for item in Assurance)
MAX_BYTES: Final = 8192  # what the gateway takes of wishes
DAY_MS: Final = 24 * 3600 * 1000


def split_wishes(body: bytes) -> tuple[bytes, Preferences | None]:
    """The body without its `provider` object, and the object. Raises BadRequest for a bad one.

    A body that is no JSON object comes back as it is: its parser says what is wrong.
    """
    if b'"provider"' not in body:
        return body, None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body, None
    if not isinstance(value, dict) or FIELD not in value:
        return body, None
    asked = value.pop(FIELD)
    if asked is None:  # as OpenAI's: the same as left out
        return json.dumps(value).encode(), None
    try:
        wishes = Preferences.model_validate_json(json.dumps(asked))
    except ValidationError as error:
        names = sorted({_named(one["loc"]) for one in error.errors()})
        known = ", ".join(Preferences.model_fields)
        raise BadRequest(
            f"Not of their form: {', '.join(names)[:300]}. `{FIELD}` takes {known}.",
            param=names[0], code="invalid_value",
        ) from None  # fmt: skip
    if len(wishes.to_canonical()) > MAX_BYTES:
        raise BadRequest(
            f"`{FIELD}` is too long: its lists take {MAX_BYTES} bytes together; name fewer.",
            param=FIELD, code="invalid_value",
        )  # fmt: skip
    return json.dumps(value).encode(), wishes


def with_tiers(body: bytes, named: str | None) -> bytes:
    """The body with a header's tiers ("open, attested") as its `provider.tiers`.

    A body that names tiers itself, or that is no JSON object, stays as it is. Raises BadRequest
    for a word that is no tier.
    """
    if named is None:
        return body
    tiers = [word.strip() for word in named.split(",")]
    if not all(word in _TIERS for word in tiers):
        raise BadRequest(
            f"The header {TIERS_HEADER} lists tiers, with commas between: {', '.join(_TIERS)}.",
            param=TIERS_HEADER, code="invalid_value",
        )  # fmt: skip
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(value, dict):
        return body
    asked = value.get(FIELD) or {}
    if not isinstance(asked, dict) or "tiers" in asked:
        return body
    return json.dumps({**value, FIELD: {**asked, "tiers": tiers}}).encode()


_PRIORITIES: Final[dict[str, Priority]] = {
    "flex": "flex", "default": "normal", "priority": "priority",
}  # fmt: skip


def with_tier(wishes: Preferences | None, service_tier: str | None) -> Preferences | None:
    """OpenAI's service_tier as a wish. Raises BadRequest where the caller wishes another too."""
    asked = _PRIORITIES.get(service_tier or "")  # "auto" leaves it to the wishes
    if asked is None or (wishes is None and asked == "normal"):
        return wishes
    if wishes is None:
        return Preferences(priority=asked)
    if "priority" in wishes.model_fields_set and wishes.priority != asked:
        raise BadRequest(
            f"`service_tier` and `{FIELD}.priority` ask for two priorities; give one of them.",
            param="service_tier", code="invalid_value",
        )  # fmt: skip
    return wishes.model_copy(update={"priority": asked})


def _named(place: tuple[int | str, ...]) -> str:
    """Where a wish is wrong, with nothing of a caller's that does not print."""
    text = ".".join(map(str, (FIELD, *place)))
    return "".join(char for char in text if char.isprintable())[:64]


def fitting(candidates: Sequence[Candidate], wishes: Preferences | None) -> list[Candidate]:
    """Those who are what the caller asks for. Raises BadRequest naming the wish that none meets."""
    left = list(candidates)
    if wishes is None:
        return left
    only = wishes.order if wishes.order and not wishes.fallbacks else ()
    most_in, most_out = wishes.max_input_nanoton_per_mtok, wishes.max_output_nanoton_per_mtok
    filters: tuple[tuple[str, bool, Any], ...] = (
        ("only", bool(wishes.only), lambda c: c.provider_id in wishes.only),
        ("order", bool(only), lambda c: c.provider_id in only),
        ("ignore", bool(wishes.ignore), lambda c: c.provider_id not in wishes.ignore),
        ("tiers", bool(wishes.tiers), lambda c: c.assurance.value in wishes.tiers),
        # who says nothing of these does not pass
        ("quantisations", bool(wishes.quantisations),
         lambda c: c.quantisation in wishes.quantisations),
        ("regions", bool(wishes.regions), lambda c: c.region in wishes.regions),
        ("max_input_nanoton_per_mtok", most_in is not None,
         lambda c: c.quote.input_nanoton_per_mtok <= (most_in or 0)),
        ("max_output_nanoton_per_mtok", most_out is not None,
         lambda c: c.quote.output_nanoton_per_mtok <= (most_out or 0)),
    )  # fmt: skip
    for name, wished, keep in filters:
        if wished:
            left = [item for item in left if keep(item)]
            if candidates and not left:
                raise BadRequest(
                    f"No provider of this model meets `{FIELD}.{name}`; widen it or leave it out.",
                    param=f"{FIELD}.{name}", code="no_provider",
                )  # fmt: skip
    return left


class Affinity:
    """Makes the blind keys of one client. Another client, or another day, makes others."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, request: TextRequest, api_key: str, now_ms: int) -> str:
        """32 hex digits for what comes before the first answer: it stays as a conversation grows.

        The key, `user` and `safety_identifier` are in it: two tenants never share a warm cache.
        Whether something was cached, or keys are equal, would tell one what the other asks.
        """
        beginning = hashlib.sha256()
        left = AFFINITY_BYTES
        for role, said in request.turns:
            if role == "assistant" or left <= 0:
                break
            text = said[:left].encode("utf-8", "surrogatepass")[:left]
            left -= len(text)
            beginning.update(b"%b\0%d\0" % (role.encode(), len(text)))
            beginning.update(text)
        named = b"cocoon affinity\0%d\0" % (now_ms // DAY_MS)
        known_as = request.safety_identifier if isinstance(request, ChatRequest) else None
        tenant = (api_key, request.user or "", known_as or "")
        for part in (*tenant, request.model):
            named += hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest()
        return hmac.digest(self._secret, named + beginning.digest(), "sha256")[:16].hex()
