"""What a client asks of its provider beside the sealed request: two headers, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pydantic import ValidationError

from cocoon.contracts.matching import Preferences
from cocoon.kernel.errors import BadRequest

PREFERENCES_HEADER: Final = b"x-cocoon-preferences"
AFFINITY_HEADER: Final = b"x-cocoon-affinity"
MAX_PREFERENCES_BYTES: Final = 8192
_AFFINITY: Final = re.compile(rb"[0-9a-f]{32}\Z")


def read_preferences(headers: Mapping[bytes, bytes]) -> Preferences | None:
    """Raises BadRequest naming the field that is not of its form."""
    text = headers.get(PREFERENCES_HEADER)
    if text is None:
        return None
    if len(text) > MAX_PREFERENCES_BYTES:
        raise _refused(f"it has at most {MAX_PREFERENCES_BYTES} bytes")
    try:
        return Preferences.model_validate_json(text)
    except ValidationError as error:
        fields = sorted({".".join(map(str, one["loc"])) or "all of it" for one in error.errors()})
        raise _refused(f"these are not of their form: {', '.join(fields)[:300]}") from None


def read_affinity(headers: Mapping[bytes, bytes]) -> str:
    """Raises BadRequest."""
    text = headers.get(AFFINITY_HEADER, b"")
    if text and _AFFINITY.match(text) is None:
        raise BadRequest(
            "X-Cocoon-Affinity is 32 hex digits; leave it out if there is nothing to keep warm",
            param="x-cocoon-affinity",
        )
    return text.decode("ascii")


def _refused(why: str) -> BadRequest:
    return BadRequest(
        f"X-Cocoon-Preferences is a JSON object of provider preferences; {why}",
        param="x-cocoon-preferences",
    )
