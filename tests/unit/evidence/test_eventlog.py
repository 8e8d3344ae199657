"""Event logs: every run-time digest is recomputed, and the registers must be reached."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from cocoon.evidence.eventlog import RUNTIME_EVENT, Event, check_event_log
from tests.support.sentences import is_sentence

PLAIN = [(0, 1, "", "00"), (1, 4, "", "01"), (3, RUNTIME_EVENT, "model", "aabb")]


def log_of(rows: list[tuple[int, int, str, str]]) -> list[dict[str, Any]]:
    log = []
    for imr, kind, name, payload in rows:
        row: dict[str, Any] = {
            "imr": imr,
            "event_type": kind,
            "event": name,
            "event_payload": payload,
        }
        draft = Event(**{**row, "digest": "00" * 48})
        digest = draft.own_digest() if imr == 3 else hashlib.sha384(payload.encode()).hexdigest()
        log.append({**row, "digest": digest})
    return log


def registers_of(log: list[dict[str, Any]]) -> list[str]:
    registers = [bytes(48)] * 4
    for row in log:
        joined = registers[row["imr"]] + bytes.fromhex(row["digest"])
        registers[row["imr"]] = hashlib.sha384(joined).digest()
    return [register.hex() for register in registers]


def verdict_of(log: object, registers: list[str]) -> str:
    return str(check_event_log(json.dumps(log).encode(), registers) or "ok")


def test_a_run_time_digest_is_over_type_name_and_payload() -> None:
    """As dstack measures: the type in four bytes, little-endian, and colons between the parts."""
    event = Event(
        imr=3, event_type=RUNTIME_EVENT, event="model", event_payload="aabb", digest="00" * 48
    )
    known = hashlib.sha384(b"\x01\x00\x00\x08:model:\xaa\xbb").hexdigest()
    assert event.own_digest() == known


def test_a_log_that_replays_is_taken() -> None:
    log = log_of(PLAIN)
    assert verdict_of(log, registers_of(log)) == "ok"


def test_an_edited_payload_under_its_old_digest_is_refused() -> None:
    log = log_of(PLAIN)
    log[2]["event_payload"] = "aabc"
    assert verdict_of(log, registers_of(log)) == "reject:event_digest"


def test_a_log_of_other_registers_is_refused() -> None:
    log = log_of(PLAIN)
    registers = registers_of(log)
    assert verdict_of(log[:-1], registers) == "reject:rtmr_mismatch"
    assert verdict_of([log[1], log[0], log[0], log[2]], registers) == "reject:rtmr_mismatch"


@pytest.mark.parametrize(
    "row", [(3, 4, "model", "aa"), (3, RUNTIME_EVENT, "a:b", "aa")], ids=["firmware", "colon"]
)
def test_an_event_whose_payload_is_not_bound_is_refused(row: tuple[int, int, str, str]) -> None:
    log = log_of([row])
    assert verdict_of(log, registers_of(log)) == "reject:event_digest"


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"[" * 50_000, b" " * (1024 * 1024 + 1)])
def test_noise_is_no_event_log(data: bytes) -> None:
    verdict = check_event_log(data, ["00" * 48] * 4)
    assert str(verdict) == "reject:malformed"
    assert verdict is not None
    assert is_sentence(verdict.sentence)
    assert verdict.sentence.endswith("The event log cannot be read.")


def test_a_log_may_fill_its_bound() -> None:
    log = log_of(PLAIN)
    data = json.dumps(log).encode().ljust(1024 * 1024)
    assert check_event_log(data, registers_of(log)) is None
    assert str(check_event_log(data + b" ", registers_of(log))) == "reject:malformed"
