"""What an operator sees of a job: one trace, counters that rise, JSON logs, and no content."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from cocoon.client import NetworkOptions
from tests.support.asking import ask, get, sql, wait_ended
from tests.support.network import LiveNetwork
from tests.support.otlp_collector import Collector
from tests.support.ways import Way, way

SERVICES = ("attestation", "billing", "matcher", "gateway", "provider")
JOURNEY = {
    ("sidecar", "client.chat"),
    ("gateway", "gateway.run_job"),
    ("matcher", "matcher.request_job"),
    ("provider", "provider.run_job"),
    ("billing", "billing.submit_result"),
}
_SAMPLE = re.compile(
    r'[a-z_]+(?:\{(?:[a-z_]+="[^"]*",?)*\})? (?:[0-9.]+(?:e[+-]?[0-9]+)?|NaN|[+-]Inf|-1\.0)\Z'
)


def metrics(network: LiveNetwork, service: str) -> dict[str, float]:
    answer = httpx.get(f"{network.running.observe_urls[service]}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for line in answer.text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            continue
        assert _SAMPLE.match(line) or "python_info" in line or "platform" in line, line
        name, _, value = line.rpartition(" ")
        found[name] = float(value)
    return found


def test_one_trace_covers_a_job_over_every_process(
    network: LiveNetwork, collector: Collector, sidecar: Way
) -> None:
    answer = sidecar.complete(**ask("Reverse: cocoon"))
    job_id = answer.id.removeprefix("chatcmpl-")
    wait_ended(network, job_id)

    def whole() -> bool:
        return {s[1] for s in JOURNEY} <= {
            s.name for s in collector.spans if s.attributes.get("cocoon.job_id") == job_id
        }

    assert collector.wait(whole), sorted({(s.service, s.name) for s in collector.spans})
    (trace_id,) = collector.trace_of(job_id)
    spans = [span for span in collector.spans if span.trace_id == trace_id]
    assert {(span.service, span.name) for span in spans} == JOURNEY
    ids = {span.span_id for span in spans}
    roots = [span for span in spans if not span.parent_id]
    assert [(span.service, span.name) for span in roots] == [("sidecar", "client.chat")]
    assert all(span.parent_id in ids for span in spans if span not in roots)
    stored = sql(network, "SELECT stream, traceparent FROM log.events")
    traces = {told.split("-")[1] for stream, told in stored if stream == f"job/{job_id}"}
    assert traces == {trace_id}  # the log names it too


def test_a_callers_own_trace_goes_on(
    network: LiveNetwork, collector: Collector, options: NetworkOptions, sidecar: Way
) -> None:
    trace_id = "5c" * 16
    headers = {"traceparent": f"00-{trace_id}-{'ab' * 8}-01"}
    with way("sync in-process", "", options) as inside:
        for client in (sidecar, inside):
            client.complete(**ask("Hello"), extra_headers=headers)

    def told() -> list[tuple[str, str]]:
        return sorted((s.service, s.name) for s in collector.spans if s.trace_id == trace_id)

    # this process exports nothing, so its own job has no span of a client
    wanted = sorted([*JOURNEY, *(JOURNEY - {("sidecar", "client.chat")})])
    assert collector.wait(lambda: told() == wanted), told()


def test_spans_carry_ids_and_codes_only(collector: Collector, sidecar: Way) -> None:
    sidecar.complete(**ask("Uppercase: wombats dream"))
    collector.wait(lambda: False, timeout_s=1.5)
    assert collector.spans
    for span in collector.spans:
        assert set(span.attributes) <= {
            "cocoon.job_id", "cocoon.provider_id", "cocoon.error_class", "cocoon.code",
        }, span  # fmt: skip
    assert not any(b"wombat" in body.lower() for body in collector.bodies)


def test_counters_rise_with_a_job(network: LiveNetwork, sidecar: Way) -> None:
    before = {service: metrics(network, service) for service in SERVICES}
    answer = sidecar.complete(**ask("Reverse: cocoon"))
    wait_ended(network, answer.id.removeprefix("chatcmpl-"))
    get(network, "/v1/models", api_key="ck_none")
    after = {service: metrics(network, service) for service in SERVICES}

    def rise(service: str, name: str) -> float:
        return after[service].get(name, 0) - before[service].get(name, 0)

    for service, name in (
        ("gateway", 'cocoon_http_requests_total{route="run_job",status="2xx"}'),
        ("gateway", 'cocoon_dispatches_total{outcome="accepted"}'),
        ("gateway", "cocoon_job_seconds_count"),
        ("gateway", "cocoon_first_token_seconds_count"),
        ("matcher", 'cocoon_matches_total{outcome="matched"}'),
        ("matcher", 'cocoon_matches_total{outcome="committed"}'),
        ("matcher", "cocoon_match_seconds_count"),
        ("provider", 'cocoon_answers_total{status="complete"}'),
        ("billing", 'cocoon_settlements_total{outcome="settled"}'),
        ("billing", "cocoon_settle_seconds_count"),
    ):
        assert rise(service, name) == 1, (service, name)
    assert rise("gateway", 'cocoon_refusals_total{code="invalid_api_key"}') == 1
    assert rise("provider", 'cocoon_tokens_total{kind="output"}') >= 6
    assert rise("provider", "cocoon_engine_step_seconds_count") >= 1
    assert after["gateway"]["cocoon_jobs_in_flight"] == 0
    assert after["provider"]["cocoon_jobs_in_flight"] == 0
    assert after["billing"]['cocoon_ledger_imbalance_nanoton{shard="1"}'] == 0
    assert after["billing"]['cocoon_relay_lag_positions{shard="1"}'] >= 0
    assert after["billing"]['cocoon_tail_lag_positions{consumer="ledger",shard="1"}'] >= 0
    assert after["matcher"]['cocoon_append_batch_items_count{role="matcher"}'] > 0
    assert after["matcher"]['cocoon_jobs_total{outcome="settled"}'] > 0
    verdicts = [n for n in after["attestation"] if n.startswith("cocoon_verdicts_total{")]
    assert any('outcome="ok"' in name for name in verdicts)
    assert after["attestation"]["cocoon_next_expiry_seconds"] > 0


@pytest.mark.parametrize("service", SERVICES)
def test_health_is_a_table_and_nothing_else_is_served(network: LiveNetwork, service: str) -> None:
    url = network.running.observe_urls[service]
    answer = httpx.get(f"{url}/healthz", trust_env=False)
    assert answer.status_code == 200
    assert set(answer.json().values()) == {True}
    assert httpx.get(f"{url}/", trust_env=False).status_code == 404
    assert httpx.post(f"{url}/metrics", trust_env=False).status_code == 405


def test_logs_are_json_lines_with_the_listed_fields_only(
    network: LiveNetwork, sidecar: Way
) -> None:
    sidecar.complete(**ask("Hello"))
    logs = sorted(network.folder.logs.glob("*.log"))
    assert {log.stem for log in logs} >= {*SERVICES, "sidecar"}
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            assert {"time", "level", "service", "event"} <= set(told), (log.name, line)
            assert re.fullmatch(r"[a-z0-9_.]+", told["event"])
            assert told["event"] not in ("unnamed_event", "uncaught", "task_died"), line
            assert told["level"] not in ("critical", "error"), line
    assert network.output.read_text() == ""
