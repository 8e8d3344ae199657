"""Traces carry one trace id through texts, and nothing but listed attributes to a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cocoon.kernel.errors import ConfigurationError, Forbidden
from cocoon.telemetry.tracing import configure_tracing, extract, inject, span

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
CANARY = "CANARY the patient's name"


class Collector:
    """An OTLP/HTTP receiver that decodes what comes, as any collector would."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.bodies.append(body)
                outer.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def test_a_trace_crosses_processes_and_reaches_the_collector(collector: Collector) -> None:
    stop = configure_tracing("matcher", collector.url)
    with span("match_job", PARENT, {"job_id": "ab" * 16, "epoch": 1, "prompt": CANARY}):
        carried = inject()
        with pytest.raises(Forbidden), span("append_batch", attributes={"code": CANARY}):
            raise Forbidden(CANARY, code="not_yours")
    stop()
    spans = {
        s.name: s
        for r in collector.requests for g in r.resource_spans
        for scope in g.scope_spans for s in scope.spans
    }  # fmt: skip
    assert {s.trace_id.hex() for s in spans.values()} == {"ab" * 16}
    assert spans["match_job"].parent_span_id.hex() == "cd" * 8
    assert carried == f"00-{'ab' * 16}-{spans['match_job'].span_id.hex()}-01"
    assert spans["append_batch"].parent_span_id == spans["match_job"].span_id
    attributes = {a.key: a.value for a in spans["match_job"].attributes}
    assert attributes.keys() == {"cocoon.job_id", "cocoon.epoch"}
    failed = {a.key: a.value.string_value for a in spans["append_batch"].attributes}
    assert failed == {"cocoon.code": "not_yours", "cocoon.error_class": "Forbidden"}
    assert b"patient" not in b"".join(collector.bodies)


def test_an_unsampled_parent_stays_unsampled(collector: Collector) -> None:
    stop = configure_tracing("matcher", collector.url)
    with span("match_job", PARENT[:-1] + "0"):
        assert inject().endswith("-00")
    stop()
    assert collector.requests == []


def test_without_an_endpoint_the_parent_is_handed_on_and_nothing_recorded() -> None:
    configure_tracing("matcher", None)()
    with span("match_job", PARENT) as found:
        assert inject() == PARENT
        assert not found.is_recording()
    assert inject() == ""


def test_a_collector_that_is_away_costs_no_error() -> None:
    stop = configure_tracing("matcher", "http://127.0.0.1:9")
    with span("match_job"):
        assert inject().startswith("00-")
    stop()


@given(st.text(max_size=60) | st.just(PARENT.upper()) | st.just("00-" + "0" * 32 + "-" + "0" * 16))
def test_malformed_parents_begin_a_new_trace(text: str) -> None:
    assert inject(extract(text)) == ""


def test_a_bad_endpoint_or_ratio_is_refused_at_start() -> None:
    with pytest.raises(ConfigurationError):
        configure_tracing("matcher", "localhost:4318")
    with pytest.raises(ConfigurationError):
        configure_tracing("matcher", None, 1.5)
