"""Schemathesis against a running network, from the published docs/openapi.json: whatever is sent,
with a key or without, the gateway answers as the document says and never with a 5xx."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.support.gateway_world import SEALED_TYPE, envelope
from tests.support.network import ROOT, LiveNetwork

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_headers_conformance, response_schema_conformance, ignored_auth, unsupported_method,
]  # fmt: skip
FEW = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
_SEALED = envelope()[1]


def _damaged(at: int, byte: int, cut: int) -> bytes:
    """A sealed request with one byte set and its end cut off."""
    at %= len(_SEALED)
    return (_SEALED[:at] + bytes([byte]) + _SEALED[at + 1 :])[: len(_SEALED) - cut % len(_SEALED)]


schemathesis.openapi.format(
    "binary",
    st.one_of(
        st.binary(max_size=2_000),
        st.binary(max_size=2_000).map(lambda rest: b"CAI1" + rest),
        st.builds(_damaged, st.integers(0), st.integers(0, 255), st.just(0) | st.integers(0)),
    ),
)


@schemathesis.serializer(SEALED_TYPE)
def _as_it_is(_context: Any, value: Any) -> Any:
    return value if isinstance(value, bytes) else str(value).encode()


schema = schemathesis.openapi.from_path(ROOT / "docs" / "openapi.json").exclude(
    path=["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]  # the sidecar's
)


@pytest.fixture(scope="module")
def network() -> Iterator[LiveNetwork]:
    folder = Path(tempfile.mkdtemp(prefix="cocoon-fuzz-"))
    try:
        with LiveNetwork(folder / "data") as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def job_id(network: LiveNetwork) -> str:
    """A job of the key that the network gave."""
    answer = httpx.post(
        f"{network.sidecar}/chat/completions", timeout=60,
        json={"model": "skills-1", "messages": [{"role": "user", "content": "Say yes"}]},
    )  # fmt: skip
    assert answer.status_code == 200
    return answer.headers["x-cocoon-job-id"]


@pytest.mark.network
@schema.parametrize()
@FEW
def test_requests_with_a_key_are_answered_as_the_document_says(
    case: schemathesis.Case, network: LiveNetwork
) -> None:
    headers = {"Authorization": f"Bearer {network.api_key}"}
    case.call_and_validate(base_url=network.gateway, headers=headers, checks=CHECKS)


@pytest.mark.network
@schema.include(path_regex="job_id").parametrize()
@FEW
def test_requests_for_a_real_job_are_answered_as_the_document_says(
    case: schemathesis.Case, network: LiveNetwork, job_id: str
) -> None:
    case.path_parameters = {"job_id": job_id}
    headers = {"Authorization": f"Bearer {network.api_key}"}
    case.call_and_validate(base_url=network.gateway, headers=headers, checks=CHECKS)


@pytest.mark.network
@schema.parametrize()
@FEW
def test_requests_without_a_live_key_are_answered_as_the_document_says(
    case: schemathesis.Case, network: LiveNetwork
) -> None:
    response = case.call(base_url=network.gateway, headers={"Authorization": "Bearer ck_no"})
    case.validate_response(response, checks=CHECKS[:5])
    public = ("/v1/network", "/v1/directory", "/v1/manifests/{model_id}")
    assert case.operation.path in public or response.status_code in (400, 401, 405)
