"""What a refusal says to a person: one plain sentence, never an empty, shouted or broken one."""

from __future__ import annotations

import re

# What a text has when a part of it is missing, shouted, or begins in the middle.
_BROKEN = re.compile(r"XX|\bNone\b|\b[A-Z_']{3,}( [A-Z_']{2,}){3}|\. [a-z]")
# "The request is over; make a new one." or, inside a longer line, "no provider is alive; wait"
_WHOLE = re.compile(r"([A-Z]\S*|\w+_\w+) .*[\w)`]\.", re.DOTALL)
_INSIDE = re.compile(r"\S+ .*[\w)`\"']", re.DOTALL)


def is_sentence(text: object) -> bool:
    if not isinstance(text, str) or text == text.upper() or _BROKEN.search(text):
        return False
    return any(form.fullmatch(text) for form in (_WHOLE, _INSIDE))


def says_why(error: BaseException) -> bool:
    """For `pytest.raises(..., check=says_why)`: the error's text is one a person can act on."""
    return is_sentence(str(error))
