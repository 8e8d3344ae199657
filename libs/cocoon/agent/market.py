"""What a gateway tells everybody: its clock, its network, what providers of a model ask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from cocoon.kernel.errors import ConfigurationError, Unavailable

TIMEOUT_S: Final = 5.0
MAX_BODY_BYTES: Final = 32 * 1024 * 1024


def get_json(url: str) -> dict[str, Any]:
    """GET an object. Raises Unavailable, ConfigurationError for what is none."""
    import httpx  # a tenth of a second that a command without a network need not wait

    try:
        answer = httpx.get(url, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        raise Unavailable(
            f"{url} does not answer; is the address right, is the network up?"
        ) from None
    if answer.status_code != 200:
        raise Unavailable(f"{url} answers with HTTP {answer.status_code}")
    try:
        found = json.loads(answer.content[:MAX_BODY_BYTES])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{url} does not answer as a Cocoon gateway does")
    return found


@dataclass(frozen=True, slots=True)
class Prices:
    """nanoTON per million tokens."""

    input: int
    cached_input: int
    output: int


def offers(gateway: str, model: str, but: str = "") -> list[Prices]:
    """What the directory's providers of a model ask, but the one of this id.

    Raises Unavailable, ConfigurationError.
    """
    listing = get_json(f"{gateway}/v1/directory?model={quote(model, safe='')}")
    return [
        Prices(
            int(entry["offer"]["input_nanoton_per_mtok"]),
            int(entry["offer"]["cached_input_nanoton_per_mtok"]),
            int(entry["offer"]["output_nanoton_per_mtok"]),
        )
        for entry in listing.get("providers", [])
        if entry.get("provider_id") != but
    ]


def median(found: Sequence[Prices]) -> Prices:
    """The middle one by the price of an answer; of two the cheaper."""
    return sorted(found, key=lambda one: (one.output, one.input))[(len(found) - 1) // 2]


def percentile(price: Prices, found: Sequence[Prices]) -> int:
    """Of 100 of the others, how many are cheaper per token of the answer."""
    return sum(one.output < price.output for one in found) * 100 // max(1, len(found))
