"""What an OpenAI-compatible server's JSON says, read with suspicion: pieces, ends, token counts.

Pure. Nothing of a server's text reaches an error: it may quote the prompt.
"""

from __future__ import annotations

import json
from typing import Any

from cocoon.chat import TokenLogprob, TokenUsage
from cocoon.kernel.errors import Unavailable
from services.provider.backends.base import Ended, Piece


def ended(reason: Any, usage: Any) -> Ended:
    """The end of an answer. Raises Unavailable without a reason or counts."""
    if reason not in ("stop", "length") or not isinstance(usage, dict):
        raise failed("The engine's server ended without a reason or token counts.")
    try:
        return Ended(reason, _usage(usage))
    except (KeyError, ValueError, TypeError):
        raise failed("The engine's server gave token counts that are none.") from None


def piece(choice: dict[str, Any], where: str, tokens: int = 1) -> Piece | None:
    """What one choice says, or None. `tokens` counts where no log probabilities do."""
    text = (choice.get(where) or {}).get("content") or ""
    found = ((choice.get("logprobs") or {}).get("content")) or ()
    logprobs = tuple(_logprob(entry) for entry in found)
    if not text and not logprobs:
        return None
    return Piece(text, len(logprobs) or tokens, logprobs)


def _logprob(entry: dict[str, Any]) -> TokenLogprob:
    raw = entry.get("bytes")
    text = str(entry["token"])
    return TokenLogprob(
        text,
        bytes(raw) if raw is not None else text.encode(),
        float(entry["logprob"]),
        tuple(_logprob(rival) for rival in entry.get("top_logprobs") or ()),
    )


def _usage(value: dict[str, Any]) -> TokenUsage:
    prompt_details = value.get("prompt_tokens_details") or {}
    details = value.get("completion_tokens_details") or {}
    prompt, completion = int(value["prompt_tokens"]), int(value["completion_tokens"])
    return TokenUsage(
        prompt=prompt,
        completion=completion,
        cached=min(int(prompt_details.get("cached_tokens") or 0), prompt),
        reasoning=min(int(details.get("reasoning_tokens") or 0), completion),
    )


def failed(message: str) -> Unavailable:
    """The engine's fault, in our own words."""
    return Unavailable(message, code="engine_failed")


def named(body: bytes) -> tuple[str | None, str | None]:
    """The code and param of an OpenAI error, if they look like names."""
    try:
        error = json.loads(body)["error"]
        found = [error.get(name) for name in ("code", "param")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, None
    code, param = (
        value if isinstance(value, str) and value.isidentifier() and len(value) <= 64 else None
        for value in found
    )
    return code, param
