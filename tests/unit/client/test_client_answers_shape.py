"""What a stream may show early, server-sent events, errors and the price of an answer. Pure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cocoon.client
from cocoon.chat import Answer, TokenUsage, parse_chat_request, to_json
from cocoon.client.answers import (
    Settlement,
    StreamShaper,
    enclave_error,
    sse_event,
    whole_body,
)
from cocoon.client.checks import Match, check_answer, read_match
from cocoon.client.trace import child_traceparent
from cocoon.contracts.events import Quote
from cocoon.domain import pricing
from cocoon.kernel.errors import BadRequest, Conflict, EvidenceRejected, RateLimited, Unavailable
from cocoon.sealing import Receipt, Status
from tests.support.sealing_world import MODEL, NOW_MS, Counted, header
from tests.unit.client.test_client_bounds_and_choice import candidate

QUOTE = Quote(
    model_id=MODEL.hex(), input_nanoton_per_mtok=3_000_000, cached_input_nanoton_per_mtok=1_000_000,
    output_nanoton_per_mtok=5_000_000, fee_bps=100,
)  # fmt: skip
RECEIPT = Receipt(
    status=Status.COMPLETE, job_id=header().job_id, epoch=3, key_id=bytes(16), model_id=MODEL,
    quote_id=bytes.fromhex(pricing.quote_id(QUOTE)), req_hash=bytes(32), resp_hash=bytes(32),
    prompt_commit=bytes(32), output_commit=bytes(32), input_tokens=64, cached_input_tokens=0,
    output_tokens=128, reasoning_tokens=0, price_nanoton=64 * 3 + 128 * 5, opened_ms=NOW_MS,
    first_ms=NOW_MS, last_ms=NOW_MS, evidence_id=bytes(32), seq=0, prev_receipt_hash=bytes(32),
)  # fmt: skip
USAGE = TokenUsage(prompt=40, completion=100)
SETTLEMENT = Settlement("ab" * 16, "prov_x", MODEL.hex(), "attested", RECEIPT, b"\x01" * 420)
MATCH = Match("ab" * 16, "p", 3, QUOTE, RECEIPT.quote_id, "00" * 32)


def answer(**more: Any) -> Answer:
    request = parse_chat_request(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, **more}
    )
    return Answer("ab" * 16, 1, "fp", request)


def test_content_leaves_at_once_and_the_end_waits_for_the_receipt() -> None:
    made, shaper = answer(), StreamShaper(include_usage=False)
    early = [to_json(made.role_chunk()), to_json(made.delta_chunk("a"))]
    assert [shaper.take(item) for item in early] == early
    final = to_json(made.final_chunk("stop"))
    assert shaper.take(final) is None
    assert shaper.take(to_json(made.usage_chunk(USAGE))) is None
    assert shaper.finish(SETTLEMENT, to_json(USAGE.to_openai())) == [final]


@pytest.mark.parametrize("enclave_sends_it", [True, False])
def test_the_usage_chunk_holds_the_cost_when_asked_for(enclave_sends_it: bool) -> None:
    made = answer(stream_options={"include_usage": True})
    shaper = StreamShaper(include_usage=True)
    assert shaper.take(to_json(made.delta_chunk("a"))) is not None  # its usage is null
    shaper.take(to_json(made.final_chunk("stop")))
    if enclave_sends_it:
        shaper.take(to_json(made.usage_chunk(USAGE)))
    last = json.loads(shaper.finish(SETTLEMENT, to_json(USAGE.to_openai()))[-1])
    assert last["choices"] == []
    assert last["id"] == f"chatcmpl-{'ab' * 16}"
    assert last["usage"]["total_tokens"] == 140
    assert last["usage"]["cocoon"] == SETTLEMENT.to_usage()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"choices":1}', b'{"x":"\xff"}'])
def test_what_is_not_a_chunk_is_refused(content: bytes) -> None:
    with pytest.raises(EvidenceRejected):
        StreamShaper(include_usage=False).take(content)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20)))
@settings(max_examples=50)
def test_an_event_is_one_line_whatever_its_json(value: dict[str, str]) -> None:
    for content in (to_json(value), json.dumps(value, indent=1).encode()):
        event = sse_event(content)
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        line = event[6:-2]
        assert b"\n" not in line
        assert b"\r" not in line
        assert json.loads(line) == value


def test_a_whole_body_keeps_everything_and_gains_its_cost() -> None:
    body = answer().completion("text", "stop", USAGE)
    told = json.loads(whole_body(to_json(body), SETTLEMENT))
    assert told["usage"].pop("cocoon") == SETTLEMENT.to_usage()
    assert told == body
    for bad in (b"", b"[]", b"{", b'{"a":NaN}', b'{"a":1e999}', b'{"a":"\\ud800"}'):
        with pytest.raises(EvidenceRejected):
            whole_body(bad, SETTLEMENT)


@pytest.mark.parametrize("last", [b'{"usage":[1]}', b'{"usage":"canary"}'])
def test_a_usage_that_is_no_object_is_refused(last: bytes) -> None:
    shaper = StreamShaper(include_usage=True)
    assert shaper.take(last) is None
    with pytest.raises(EvidenceRejected, match="JSON"):
        shaper.finish(SETTLEMENT, None)


def test_a_usage_record_that_cannot_be_written_is_refused() -> None:
    shaper = StreamShaper(include_usage=True)
    shaper.take(b'{"choices":[]}')
    with pytest.raises(EvidenceRejected, match="not JSON"):
        shaper.finish(SETTLEMENT, b'{"a":"\\ud800"}')


def test_an_error_record_becomes_the_trees_error() -> None:
    refused = replace(RECEIPT, status=Status.REFUSED, price_nanoton=0)
    told = to_json(BadRequest("Too long.", code="too_long", param="messages").to_openai())
    error = enclave_error(refused, told)
    assert isinstance(error, BadRequest)
    assert (error.message, error.code, error.param) == ("Too long.", "too_long", "messages")
    busy = to_json(RateLimited("Busy.").to_openai())
    assert isinstance(enclave_error(replace(RECEIPT, status=Status.FAILED), busy), RateLimited)
    halves = enclave_error(refused, b'{"error":{"message":"a\\ud800","code":"\\udfff"}}')
    assert halves is not None
    assert (halves.message, halves.code) == ("a?", "?")
    for bad in (b"", b"[]", b'{"error":1}', b'{"error":{"type":[]}}'):
        assert isinstance(enclave_error(refused, bad), BadRequest)
    assert isinstance(enclave_error(replace(RECEIPT, status=Status.FAILED), None), Unavailable)
    assert isinstance(enclave_error(replace(RECEIPT, status=Status.CANCELLED), None), Conflict)
    assert enclave_error(replace(RECEIPT, status=Status.LENGTH), None) is None


def check(receipt: Receipt = RECEIPT, usage: bytes | None = None, **match: Any) -> None:
    told = to_json(USAGE.to_openai()) if usage is None else usage
    check_answer(
        receipt, replace(MATCH, **match), header=header(), usage=told or None,
        by_key_id={bytes(16): candidate("p")},
    )  # fmt: skip


def test_a_right_answer_passes() -> None:
    check()
    check(replace(RECEIPT, status=Status.FAILED, price_nanoton=0), b"")


@pytest.mark.parametrize(
    ("receipt", "code"),
    [
        ({"price_nanoton": 833}, "wrong_price"),
        ({"price_nanoton": 0}, "wrong_price"),
        ({"status": Status.FAILED}, "wrong_price"),
        ({"epoch": 4}, "receipt_mismatch"),
        ({"quote_id": bytes(32)}, "receipt_mismatch"),
        ({"evidence_id": bytes([1]) * 32}, "wrong_evidence"),
        ({"cached_input_tokens": 65}, "bad_counts"),
        ({"output_tokens": 192, "price_nanoton": 64 * 3 + 192 * 5}, "bad_counts"),
        ({"input_tokens": 128, "price_nanoton": 128 * 3 + 128 * 5}, "bad_counts"),
    ],
)
def test_a_receipt_that_does_not_add_up_is_refused(receipt: dict[str, Any], code: str) -> None:
    with pytest.raises(EvidenceRejected) as caught:
        check(replace(RECEIPT, **receipt))
    assert caught.value.code == code


def test_an_answer_without_its_exact_usage_is_refused() -> None:
    for usage, code in (
        (b"", "no_usage"),
        (b"[]", "bad_answer"),
        (b'{"prompt_tokens":-1}', "bad_answer"),
        (b'{"prompt_tokens":true}', "bad_answer"),
        (b'{"prompt_tokens":1.5}', "bad_answer"),
    ):
        with pytest.raises(EvidenceRejected) as caught:
            check(usage=usage)
        assert caught.value.code == code


def test_another_provider_than_the_sealer_is_refused() -> None:
    with pytest.raises(EvidenceRejected) as caught:
        check(provider_id="q")
    assert caught.value.code == "wrong_provider"


def read_and_check(headers: dict[str, str]) -> None:
    match = read_match(headers, job_id="ab" * 16, model_id=MODEL.hex())
    check(epoch=match.epoch, provider_id=match.provider_id, evidence_id=match.evidence_id)


def test_match_headers_must_be_whole_and_name_this_job() -> None:
    headers = {
        "x-cocoon-job-id": "ab" * 16,
        "x-cocoon-provider": "p",
        "x-cocoon-epoch": "3",
        "x-cocoon-quote": QUOTE.to_canonical().decode(),
        "x-cocoon-quote-id": pricing.quote_id(QUOTE),
        "x-cocoon-evidence-id": "00" * 32,
    }
    assert read_match(headers, job_id="ab" * 16, model_id=MODEL.hex()) == MATCH
    for name, value in headers.items():
        if name != "x-cocoon-evidence-id":
            missing = {key: kept for key, kept in headers.items() if key != name}
            with pytest.raises(EvidenceRejected):
                read_match(missing, job_id="ab" * 16, model_id=MODEL.hex())
        with pytest.raises(EvidenceRejected):
            read_and_check(headers | {name: value + "0"})


def test_a_traceparent_is_continued_or_begun() -> None:
    parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-00"
    child = child_traceparent(parent, Counted())
    assert child.startswith(parent[:36])
    assert child.endswith("-00")
    assert child != parent
    for bad in (None, "", "x", "ff" + parent[2:], "00-" + "0" * 32 + parent[35:], parent + "0"):
        assert child_traceparent(bad, Counted())[:36] != parent[:36]


def test_exports_are_complete_and_sorted() -> None:
    import importlib
    import pkgutil

    public = cocoon.client.__all__
    assert public == sorted(public)
    assert all(hasattr(cocoon.client, name) for name in public)
    for module in pkgutil.iter_modules(cocoon.client.__path__):
        if module.name != "__main__":
            importlib.import_module(f"cocoon.client.{module.name}")
    entry = {"openai_client", "async_openai_client", "transport", "async_transport"}
    assert entry | {"run_sidecar", "SidecarSettings", "NetworkOptions"} <= set(public)
    imported = {
        name
        for name, value in vars(cocoon.client).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("cocoon.client")
    }
    assert imported == set(public) - {"Piece"}  # a union has no home


def test_a_client_needs_no_log_no_bus_and_no_engine() -> None:
    """Importing the client loads nothing that only a platform or a provider installs."""
    script = "import cocoon.client, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & {"asyncpg", "nats", "faststream", "numpy", "onnxruntime", "services"}
    assert not {"cocoon.eventlog", "cocoon.bus", "openai"} & set(loaded)
