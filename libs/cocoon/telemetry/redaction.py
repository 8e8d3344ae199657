"""The allow-list that every log line and span attribute passes: known names, known shapes.

A name that is not listed is dropped; a listed name with another shape becomes its type and size.
Texts of foreign exceptions are never read, because they quote what they choked on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cocoon.kernel.errors import CocoonError

Scalar = bool | int | float | str
Value = Scalar | list[Scalar] | None

MAX_LIST = 16
MAX_FRAMES = 8
MAX_MESSAGE_CHARS = 400
_MAX_INT = 2**63

_ID = re.compile(
    r"(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # uuid
    r"|(?:prov_|acct_|key_|gw_?)?[0-9a-f]{8,64}"  # ids and digests
    r"|(?:job|provider|account|policy|honesty|dispute)/"  # log streams
    r"(?:(?:prov_|acct_)?[0-9a-f]{8,64}|network)"
    r"|none)\Z"
)
_CODE = re.compile(r"[a-z][a-z0-9_]{0,47}(?::[A-Za-z][A-Za-z0-9_]{0,31})?\Z")
_EVENT = re.compile(r"[a-z][a-z0-9_.]{0,63}\Z")
_CLASS = re.compile(r"[A-Z][A-Za-z]{0,63}\Z")
_LOGGER = re.compile(r"[a-z_][A-Za-z0-9_.]{0,95}\Z")
_VERSION = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,5}){0,3}\Z")
_SUBJECT_STREAM = re.compile(r"(?:EVENTS_[0-9]{1,5}|INGRESS|SEALED)\Z")


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and pattern.match(value) is not None


def _is_int(value: Any) -> bool:
    return type(value) is int and -_MAX_INT <= value < _MAX_INT


def _is_number(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


_id, _code, _stream = _matches(_ID), _matches(_CODE), _matches(_SUBJECT_STREAM)
_class = _matches(_CLASS)


def _named(shape: Callable[[Any], bool], names: str) -> dict[str, Callable[[Any], bool]]:
    return dict.fromkeys(names.split(), shape)


# Every field that a log line or a span may carry. Add a name here, with its shape, to use it.
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **_named(
        _id,
        "job_id provider_id account_id api_key_id key_id gateway_id boot_id event_id command_id "
        "causation_id correlation_id evidence_id quote_id policy_hash req_hash resp_hash blob_hash "
        "receipt_hash model_id stream trace_id span_id hash head_hash expected_hash",
    ),
    **_named(
        _code,
        "code reason outcome verdict connection verb state role service consumer actor component "
        "command method route tier assurance environment signal",
    ),
    **_named(
        _is_int,
        "shard position from_position to_position expected_position head_position version term "
        "epoch attempt attempts count items events size size_bytes envelope_bytes response_bytes "
        "input_tokens cached_input_tokens output_tokens reasoning_tokens status port pid exit_code "
        "queue_depth running concurrency offset retry_after_s sequence schema_version limit "
        "dropped jobs providers line price_nanoton amount_nanoton",
    ),
    **_named(
        _is_number,
        "duration_ms duration_us duration_s delay_ms delay_s lag lag_ms lease_ttl_ms timeout_s "
        "valid_until_ms expires_ms age_ms first_token_ms interval_s",
    ),
    **_named(
        lambda value: type(value) is bool,
        "ok accepted stream_response retried cancelled draining ready",
    ),
    **_named(_class, "error_class event_type command_type"),
    **_named(lambda value: _code(value) or _class(value), "kind"),  # a word, or an error's class
    **_named(_matches(_LOGGER), "logger module function"),
    **_named(_matches(_VERSION), "release"),
    **_named(_stream, "bus_stream"),
}

_SECRETS = (
    (re.compile(r"ck_[A-Za-z0-9_-]{20,}"), "ck_***"),
    (re.compile(r"\bS[AUOCNX][A-Z2-7]{40,}\b"), "S***"),  # seeds of nkeys
    (re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'@/]*@"), "***@"),  # DSNs and URLs with users
    (re.compile(r"(?i)\b(password|secret|token|bearer)\b\s*[=:]?\s*[^\s\"',;]+"), r"\1 ***"),
    (re.compile(r"-----BEGIN[^-]*-----.*?(?:-----END[^-]*-----|\Z)", re.DOTALL), "***"),
)


def mask(text: str) -> str:
    """Replace API keys, nkey seeds, credentials in URLs and PEM blocks by stars."""
    for pattern, stars in _SECRETS:
        text = pattern.sub(stars, text)
    return text


def describe(value: object) -> str:
    """The type of a refused value, and its length where it has one: `<str:12>`."""
    name = type(value).__name__ if type(value).__module__ == "builtins" else "object"
    size = f":{len(value)}" if isinstance(value, str | bytes | list | tuple | dict | set) else ""
    return f"<{name}{size}>"


def is_event_name(text: object) -> bool:
    """Whether a text may be a log event's or span's name: lower case, no spaces."""
    return type(text) is str and _EVENT.match(text) is not None


def clean(name: str, value: object) -> Value:
    """The value if `name`'s shape takes it, else its description. KeyError for an unlisted name."""
    fits = FIELDS[name]
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_safe(fits, item) for item in value[:MAX_LIST]]
    return _safe(fits, value)


def _safe(fits: Callable[[Any], bool], value: Any) -> Scalar:
    if not fits(value) or (isinstance(value, str) and mask(value) != value):
        return describe(value)
    return value  # type: ignore[no-any-return]  # each shape takes scalars only


def clean_fields(fields: Mapping[str, object]) -> dict[str, Value]:
    """The listed fields in their safe form; others are dropped and counted in `dropped`."""
    kept = {name: clean(name, value) for name, value in fields.items() if name in FIELDS}
    if len(kept) < len(fields):
        kept["dropped"] = len(fields) - len(kept)
    return kept


def error_fields(error: BaseException) -> dict[str, Value]:
    """Class, place and, for errors of our own tree only, code and message."""
    fields: dict[str, Value] = {
        "error_class": clean("error_class", type(error).__name__),
        "at": [*_frames(error.__traceback__)],
    }
    if isinstance(error, CocoonError):
        fields["code"] = clean("code", error.code)
        fields["message"] = mask(error.message[:MAX_MESSAGE_CHARS])
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        fields["cause_class"] = clean("error_class", type(cause).__name__)
    return fields


def _frames(traceback: TracebackType | None) -> list[str]:
    """The innermost places as file:line; source lines and values are not read."""
    places: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return places[-MAX_FRAMES:]
