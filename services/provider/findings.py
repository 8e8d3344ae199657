"""What a check of the doctor found: ok, warn or fail, in words, with what to do about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `remedy` is empty where there is nothing to do."""

    check: str
    state: State
    found: str
    remedy: str = ""

    def line(self) -> str:
        return json.dumps(
            {"check": self.check, "state": self.state, "found": self.found, "remedy": self.remedy}
        )


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warn(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, "warn", found, remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, "fail", found, remedy)
