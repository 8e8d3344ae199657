"""pydantic's validation errors in OpenAI's words: one sentence, `param` and `code`, no value."""

from __future__ import annotations

from typing import Any, Final, NoReturn

from pydantic import ValidationError

from cocoon.kernel.errors import BadRequest

_EXPECTED: Final = {
    "string_type": "a string", "float_type": "a number", "int_type": "an integer",
    "int_from_float": "an integer", "bool_type": "a boolean", "list_type": "an array",
    "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
    "finite_number": "a finite number",
}  # fmt: skip
_BOUNDS: Final = {
    "greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most"),
    "string_too_long": ("max_length", "at most this many characters:"),
    "string_too_short": ("min_length", "at least this many characters:"),
    "too_long": ("max_length", "at most this many items:"),
    "too_short": ("min_length", "at least this many items:"),
}  # fmt: skip
_TYPE_NAMES: Final = ("str", "list[str]")  # pydantic's names for the branches of a union


def refuse_validation(error: ValidationError) -> NoReturn:
    """Raise BadRequest for the first validation error. Never shows the input."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, param = first["type"], _path(first["loc"])
    context: dict[str, Any] = first.get("ctx", {})
    if kind == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"Unknown parameter: '{param}'.", "unknown_parameter"
    elif kind in _EXPECTED:
        message, code = f"Invalid type for '{param}': expected {_EXPECTED[kind]}.", "invalid_type"
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        message = f"Invalid '{param}': expected {words} {context.get(name)}."
        code = "invalid_value"
    elif kind == "literal_error":
        message = f"Invalid value for '{param}': expected one of {context.get('expected')}."
        code = "invalid_value"
    else:
        message, code = f"Invalid value for '{param}'.", "invalid_value"
    raise BadRequest(message, param=param, code=code) from None


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"; a caller's own keys are cut and cleaned."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _TYPE_NAMES:
            clean = "".join(c if c.isascii() and c.isprintable() else "?" for c in part[:64])
            text += f".{clean}" if text else clean
    return text
