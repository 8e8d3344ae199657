"""Every parameter of OpenAI's chat completions and what becomes of it here: the one table.

Those of the other endpoints are in `completions` and `embeddings`, made of the same rows.

A parameter is honoured, refused by name, or taken with the listed values only; none is ignored.
A test compares the table with the installed `openai` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from cocoon.kernel.errors import BadRequest


class Support(StrEnum):
    HONOURED = "honoured"
    LIMITED = "limited"  # only the listed values, which ask for nothing that is missing here
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row. `note` says what happens, or what to do instead."""

    support: Support
    note: str
    values: tuple[Any, ...] = ()


def honoured(note: str) -> Parameter:
    return Parameter(Support.HONOURED, note)


def limited(note: str, *values: Any) -> Parameter:
    return Parameter(Support.LIMITED, note, values)


def refused(note: str) -> Parameter:
    return Parameter(Support.REFUSED, note)


_NO_TOOLS: Final = "Tools are not offered; describe what you need in a message."
_NO_AUDIO: Final = "Audio is not offered; send and expect text."
_NO_CACHE: Final = "No prompt is cached between requests; leave it out."
_UNSEEN: Final = "Sealed with the prompt, seen by the enclave only, and not stored."

PARAMETERS: Final[dict[str, Parameter]] = {
    "messages": honoured("Roles developer, system, user and assistant, with text content."),
    "model": honoured("A model that the network offers."),
    "audio": refused(_NO_AUDIO),
    "frequency_penalty": honoured("-2 to 2."),
    "function_call": limited(_NO_TOOLS, "none"),
    "functions": refused(_NO_TOOLS),
    "logit_bias": honoured("Token ids to -100..100, where the model's engine can."),
    "logprobs": honoured("Where the model's engine can."),
    "max_completion_tokens": honoured("At least 1, and never over the sealed header's bound."),
    "max_tokens": honoured("The older name of max_completion_tokens; give one of them."),
    "metadata": honoured("Returned with a whole (not streamed) answer; not stored."),
    "modalities": limited(_NO_AUDIO, ["text"]),
    "moderation": refused("Nobody outside the enclave can read the text to moderate it."),
    "n": limited("One choice per request; send several requests instead.", 1),
    "parallel_tool_calls": refused(_NO_TOOLS),
    "prediction": refused("Predicted outputs are not offered; leave it out."),
    "presence_penalty": honoured("-2 to 2."),
    "prompt_cache_key": refused(_NO_CACHE),
    "prompt_cache_options": refused(_NO_CACHE),
    "prompt_cache_retention": refused(_NO_CACHE),
    "reasoning_effort": refused("The model's own effort is used; leave it out."),
    "response_format": honoured('{"type": "text"}; JSON forms where the model\'s engine can.'),
    "safety_identifier": honoured(_UNSEEN),
    "seed": honoured("The same seed and parameters give the same answer on the same engine."),
    "service_tier": limited(
        "It orders your own requests that wait for a provider; nothing costs more or less.",
        "auto",
        "default",
        "flex",
        "priority",
    ),
    "stop": honoured("Up to four texts; the answer ends before the first of them."),
    "store": limited("Answers are not stored.", False),
    "stream": honoured("Chunks in OpenAI's order."),
    "stream_options": honoured("include_usage; include_obfuscation must be false or absent."),
    "temperature": honoured("0 to 2; 0 takes the likeliest token."),
    "tool_choice": limited(_NO_TOOLS, "none"),
    "tools": refused(_NO_TOOLS),
    "top_logprobs": honoured("0 to 20, with logprobs, where the model's engine can."),
    "top_p": honoured("0 to 1."),
    "user": honoured(_UNSEEN),
    "verbosity": limited("The model's own verbosity is used.", "medium"),
    "web_search_options": refused("Web search is not offered; leave it out."),
}


def check_names(body: dict[str, Any], table: Mapping[str, Parameter] = PARAMETERS) -> None:
    """Refuse unknown and refused parameters, and values that a limited one does not take.

    A null is the same as leaving the parameter out. Raises BadRequest with `param`.
    """
    for name, value in body.items():
        known = table.get(name)
        if known is None:
            raise BadRequest(
                f"Unknown parameter: '{_shown(name)}'.",
                param=_shown(name), code="unknown_parameter",
            )  # fmt: skip
        if value is None or known.support is Support.HONOURED:
            continue
        if known.support is Support.REFUSED:
            raise BadRequest(
                f"Unsupported parameter: '{name}'. {known.note}",
                param=name, code="unsupported_parameter",
            )  # fmt: skip
        if not any(type(value) is type(allowed) and value == allowed for allowed in known.values):
            allowed_text = " or ".join(repr(allowed) for allowed in known.values)
            raise BadRequest(
                f"Unsupported value for '{name}': only {allowed_text} is taken here. {known.note}",
                param=name, code="unsupported_value",
            )  # fmt: skip


def _shown(name: str) -> str:
    """A caller's own name for something, cut short and made printable for an error's text."""
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in name[:64])
