"""Whatever a developer passes to a logger, a span or an exception, content stays inside."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.kernel.errors import Forbidden
from cocoon.telemetry import logs
from cocoon.telemetry.redaction import FIELDS, clean_fields, mask

CANARY = "CANARY-7f3a the patient's name is Ada"
API_KEY = "ck_" + "aB3-_" * 8 + "xyz"
SEED = "SUAM" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567" + "ABCDEFGHIJKLMNOPQRSTUV"
DSN = "postgresql://cocoon_billing:hunter2@127.0.0.1:5432/cocoon"


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    undo = logs.configure_logs("gateway", "debug", stream)
    yield stream
    undo()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


SECRETS = st.sampled_from([CANARY, API_KEY, SEED, DSN])
CONTENT = SECRETS | SECRETS.map(str.encode) | SECRETS.map(lambda s: [s, 1]) | SECRETS.map(
    lambda s: {"prompt": s}
) | SECRETS.map(ValueError)  # fmt: skip
NAMES = st.sampled_from(sorted(FIELDS)) | st.sampled_from(
    ["prompt", "text", "message", "error", "exc", "payload", "authorization", "time", "level", "at"]
)


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(NAMES, CONTENT, max_size=6), event=SECRETS | st.just("something"))
def test_content_in_any_field_or_event_never_reaches_the_output(
    fields: dict[str, object], event: str
) -> None:
    stream = io.StringIO()
    undo = logs.configure_logs("gateway", "debug", stream)
    try:
        log = logs.get_logger("cocoon.test")
        log.info(event, **fields)
        log.bind(**fields).error("bound", exc_info=ValueError(event))
    finally:
        undo()
    written = stream.getvalue()
    assert len(written.splitlines()) == 2
    for secret in (CANARY, "patient", API_KEY, API_KEY[3:20], SEED[:30], "hunter2"):
        assert secret not in written


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_no_listed_field_takes_a_sentence_or_a_secret(name: str) -> None:
    for secret in (CANARY, API_KEY, SEED, DSN, "two words", "Ünï", ""):
        kept = clean_fields({name: secret})[name]
        assert isinstance(kept, str)
        assert kept.startswith("<str:")


def test_ids_numbers_and_codes_pass_unchanged() -> None:
    fields = {
        "job_id": "ab" * 16, "provider_id": "prov_" + "0" * 32, "epoch": 2, "duration_ms": 1.5,
        "code": "no_provider", "verdict": "ok:UpToDate", "ok": True, "bus_stream": "EVENTS_0",
        "stream": "job/" + "ab" * 16, "event_type": "ResultSealed",
        "command_id": "6f1c2f0e-0c61-5d0b-9a53-434149310001",
    }  # fmt: skip
    assert clean_fields(fields) == fields


def test_unlisted_fields_are_dropped_and_counted() -> None:
    assert clean_fields({"prompt": "x", "epoch": 1}) == {"epoch": 1, "dropped": 1}


def test_an_integer_field_takes_neither_a_bool_nor_a_huge_number() -> None:
    kept = clean_fields({"epoch": True, "position": 2**64, "lag": float("nan")})
    assert kept == {"epoch": "<bool>", "position": "<int>", "lag": "<float>"}


def test_our_own_sentences_are_logged_with_secrets_masked(output: io.StringIO) -> None:
    try:
        raise Forbidden(f"the key {API_KEY} may not do this at {DSN}", code="not_yours")
    except Forbidden:
        logs.get_logger("cocoon.test").exception("refused")
    (line,) = lines(output)
    error = line["error"]
    assert isinstance(error, dict)
    assert error["code"] == "not_yours"
    assert "the key ck_*** may not do this" in error["message"]
    assert "hunter2" not in output.getvalue()
    assert error["at"][0].startswith("test_redaction.py:")


def test_foreign_errors_leave_their_class_and_place_only(output: io.StringIO) -> None:
    try:
        try:
            int(CANARY)
        except ValueError as error:
            raise RuntimeError(CANARY) from error
    except RuntimeError:
        logs.get_logger("cocoon.test").exception("broke")
    (line,) = lines(output)
    assert isinstance(line["error"], dict)
    assert line["error"].keys() == {"error_class", "at", "cause_class"}
    assert line["error"]["error_class"] == "RuntimeError"
    assert line["error"]["cause_class"] == "ValueError"


def test_other_libraries_lose_their_texts_and_keep_their_places(output: io.StringIO) -> None:
    for name in ("uvicorn.error", "nats.aio.client", "faststream", "some.library"):
        logging.getLogger(name).info(CANARY)
        logging.getLogger(name).error("payload %s", CANARY, exc_info=ValueError(CANARY))
    written = lines(output)
    assert [line["logger"] for line in written] == [
        "uvicorn.error", "nats.aio.client", "faststream", "some.library",
    ]  # fmt: skip
    assert all(line["module"] == "test_redaction" for line in written)
    assert "patient" not in output.getvalue()


def test_our_own_standard_records_keep_their_event_and_listed_fields(output: io.StringIO) -> None:
    log = logging.getLogger("cocoon.bus")
    log.info("bus reconnected", extra={"shard": 3, "prompt": CANARY, "code": CANARY})
    log.warning(CANARY)
    first, second = lines(output)
    assert (first["event"], first["shard"], first["code"]) == ("bus_reconnected", 3, "<str:37>")
    assert second["event"] == "library_record"
    assert "patient" not in output.getvalue()


async def test_a_task_that_dies_unseen_does_not_print_its_error(output: io.StringIO) -> None:
    async def die() -> None:
        raise ValueError(CANARY)

    task = asyncio.create_task(die())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    assert lines(output)[0]["logger"] == "asyncio"
    assert "patient" not in output.getvalue()


def test_hooks_and_warnings_print_no_texts(
    output: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    error = ValueError(CANARY)
    sys.excepthook(ValueError, error, None)
    thread = threading.Thread(target=lambda: int(CANARY))
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn(CANARY, stacklevel=1)
        logging.captureWarnings(False)
    assert [line["event"] for line in lines(output)] == [
        "uncaught",
        "thread_died",
        "library_record",
    ]
    assert "patient" not in output.getvalue()
    assert capfd.readouterr().err == ""


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    undo = logs.configure_logs("gateway", "warning", stream)
    logs.get_logger("cocoon.test").info("quiet")
    undo()
    assert stream.getvalue() == ""


@given(st.text(max_size=40), SECRETS, st.text(max_size=40))
def test_masking_finds_secrets_anywhere(before: str, secret: str, after: str) -> None:
    masked = mask(f"{before} {secret} {after}")
    if secret != CANARY:
        assert secret not in masked
