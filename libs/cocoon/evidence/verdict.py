"""A verdict: what the verifier decided, why, for how long, and what to do about it.

Immutable, and made only through `accept`, `reject` and `fail`, so that no code lacks a remedy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cocoon.evidence import codes
from cocoon.evidence.claims import Claims
from cocoon.evidence.collateral import CollateralFloors

_OK = codes.Code("The evidence is genuine and the policy takes it.", "Nothing.")
_OPEN = codes.Code(
    "The provider's own key signs the claims and the policy takes it; no TEE vouches for them.",
    "Nothing; whoever owns the machine can read what is sent to it.",
)


class Outcome(StrEnum):
    OK = "ok"
    REJECT = "reject"  # bad evidence, or the policy refuses: the same input fails again
    ERROR = "error"  # cannot decide: something is missing; never ok, may be tried again


class Assurance(StrEnum):
    """How much a verdict is worth, best first."""

    FACILITY = "facility"  # genuine hardware in a place that the policy lists
    ATTESTED = "attested"  # genuine hardware, wherever it stands
    SIMULATED = "simulated"  # a DEV ONLY authority played the vendor: nothing is protected
    OPEN = "open"  # no TEE: whoever owns the machine can read prompts and answers


@dataclass(frozen=True, slots=True)
class TdxFacts:
    """What an authentic TDX quote says. Byte strings are lower-case hex."""

    quote_version: int
    mr_td: str
    rtmrs: tuple[str, str, str, str]
    mr_config_id: str
    mr_owner: str
    mr_owner_config: str
    mr_seam: str
    td_attributes: str
    xfam: str
    report_data: str
    ppid: str
    fmspc: str
    tcb_status: str
    tcb_date_ms: int
    advisories: tuple[str, ...]
    evaluation_number: int
    root_fingerprint: str
    image: str = ""  # the policy's name of the image that matched


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verifier's whole answer. `str()` is its text form, as in the log and the vectors."""

    outcome: Outcome
    code: str  # ok: the TCB status, or "open" without a TEE; otherwise a code of codes.py
    sentence: str
    next_step: str
    assurance: Assurance | None = None  # only when ok
    valid_until_ms: int | None = None  # only when ok
    evidence_id: bytes | None = None  # SHA-256 of the signed part, where it could be read
    facts: TdxFacts | None = None  # only from an authentic quote
    claims: Claims | None = None  # only when the quote covers them
    floors: CollateralFloors | None = None  # raised by authentic collateral: persist them

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    def __str__(self) -> str:
        return f"{self.outcome.value}:{self.code}" if self.code else self.outcome.value

    def with_(self, **changes: Any) -> Verdict:
        """A copy with more known (identity, facts, floors); the decision cannot be changed."""
        if changes.keys() & {"outcome", "code"}:
            raise ValueError("a verdict's decision is final")
        return dataclasses.replace(self, **changes)


def accept(status: str, assurance: Assurance, valid_until_ms: int) -> Verdict:
    """An ok verdict; `status` is the vendor's TCB status."""
    return Verdict(
        Outcome.OK, status, _OK.sentence, _OK.next_step, assurance, valid_until_ms=valid_until_ms
    )


def accept_open(valid_until_ms: int) -> Verdict:
    """An ok verdict on claims that no TEE vouches for: `ok:open`, and never a better tier."""
    return Verdict(
        Outcome.OK, "open", _OPEN.sentence, _OPEN.next_step, Assurance.OPEN,
        valid_until_ms=valid_until_ms,
    )  # fmt: skip


def reject(code: str, detail: str = "") -> Verdict:
    """A refusal. `detail` is a plain sentence, never a payload. KeyError for an unknown code."""
    known = codes.REJECTIONS[code]
    return Verdict(Outcome.REJECT, code, _join(known.sentence, detail), known.next_step)


def fail(code: str, detail: str = "") -> Verdict:
    """An undecided verdict. KeyError for an unknown code."""
    known = codes.ERRORS[code]
    return Verdict(Outcome.ERROR, code, _join(known.sentence, detail), known.next_step)


def _join(sentence: str, detail: str) -> str:
    return f"{sentence} {detail}" if detail else sentence
