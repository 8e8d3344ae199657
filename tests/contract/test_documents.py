"""The committed documents are what the code says, and the code's table is what the bus enforces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from cocoon.bus import permissions
from cocoon.bus.accounts import berth
from cocoon.bus.permissions import ROLES, Permissions
from cocoon.chat import KINDS
from cocoon.contracts import catalogue, generate, subjects
from cocoon.contracts.events import ALL_EVENTS
from cocoon.domain.decide import stream_of
from cocoon.kernel import errors
from services.gateway import openapi
from tests.support.example_events import EXAMPLES
from tests.support.job_world import ALICE, hex16, hex32
from tests.unit.test_decide import SCENARIOS

ROOT = Path(__file__).parents[2]
PAGES = {**generate.PAGES, openapi.OPENAPI_PAGE: openapi.openapi_page}
EXAMPLE = {
    "shard": "1", "aggregate": "job", "id": hex16("job"), "event_name": "job_requested",
    "gateway_id": "gw1", "job_id": hex16("job"), "provider_id": ALICE.id, "epoch": "1",
    "sha256": hex32("blob"), "index": "0",
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_the_code_says(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == PAGES[name](), "write it again: see the page's first lines for the command"


def test_checking_names_a_stale_page_and_writing_repairs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    for main, pages in ((generate.main, generate.PAGES), (openapi.main, [openapi.OPENAPI_PAGE])):
        root = ["--root", str(tmp_path)]
        assert main(["--check", *root]) == 1
        said = capsys.readouterr().err
        assert all(page in said for page in pages)
        assert main(["--write", *root]) == 0
        assert main(["--check", *root]) == 0
    (tmp_path / generate.EVENTS_PAGE).write_text("edited by hand", encoding="utf-8")
    assert generate.main(["--check", "--root", str(tmp_path)]) == 1
    assert generate.EVENTS_PAGE in capsys.readouterr().err


# ---- the table of events ----


def test_every_event_is_in_the_table_and_nothing_else_is() -> None:
    assert list(catalogue.EVENTS) == [event.event_type for event in ALL_EVENTS]
    assert {event.event_type for event in EXAMPLES} == set(catalogue.EVENTS)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s[1].command_type)
def test_an_event_is_on_the_stream_that_the_table_names(scenario) -> None:  # type: ignore[no-untyped-def]
    _, command, types = scenario
    for name in types:
        assert stream_of(command).partition("/")[0] == catalogue.EVENTS[name][0]


def test_the_page_shows_every_field_of_every_event() -> None:
    page = generate.events_page()
    for event in ALL_EVENTS:
        section = page.partition(f"### {event.event_type}\n")[2].partition("\n### ")[0]
        assert all(f"| `{field}` |" in section for field in event.model_fields)


# ---- the table of subjects, against what the server enforces ----


def matches(pattern: str, subject: str) -> bool:
    """NATS subject matching: `*` is one word, a last `>` is one or more."""
    want, have = pattern.split("."), subject.split(".")
    for index, word in enumerate(want):
        if word == ">":
            return len(have) > index
        if index >= len(have) or word not in ("*", have[index]):
            return False
    return len(want) == len(have)


def roles() -> dict[str, Permissions]:
    made = {name: make([0, 1]) for name, make in ROLES.items()}
    return {
        **made,
        "gateway": permissions.gateway(EXAMPLE["gateway_id"]),
        "provider": permissions.provider(ALICE.id, berth(1)),
    }


def example(channel: catalogue.Channel) -> str:
    return channel.address.format(**EXAMPLE)


@pytest.mark.parametrize("channel", catalogue.CHANNELS, ids=lambda c: c.name)
def test_exactly_the_named_roles_may_publish_a_subject(channel: catalogue.Channel) -> None:
    able = {
        name for name, role in roles().items()
        if any(matches(pattern, example(channel)) for pattern in role.publish)
    }  # fmt: skip
    assert able == set(channel.publishers)


@pytest.mark.parametrize("channel", catalogue.CHANNELS, ids=lambda c: c.name)
def test_exactly_the_named_roles_may_hear_a_subject(channel: catalogue.Channel) -> None:
    able = {
        name for name, role in roles().items()
        if any(matches(pattern, example(channel)) for pattern in role.subscribe)
    }  # fmt: skip
    if channel.stream:  # read through JetStream into one's own inbox, never heard directly
        stream = channel.stream.format(**EXAMPLE)
        assert able == set()
        readers = {
            name for name, role in roles().items()
            if any(
                re.match(rf"\$JS\.API\.(CONSUMER\.(CREATE|MSG\.NEXT)|DIRECT\.GET)\.{stream}\.", p)
                for p in role.publish
            )
        }  # fmt: skip
        assert readers == set(channel.hearers)
    else:
        assert able == set(channel.hearers)


def test_the_addresses_are_those_of_the_subjects_module() -> None:
    job, provider = hex16("job"), ALICE.id
    made = {
        subjects.event(1, f"job/{job}", "JobRequested"), subjects.request_job(1),
        subjects.report_dispatch(1), subjects.cancel_at_matcher(1),
        subjects.match_updates("gw1", job), subjects.run_job(provider),
        subjects.cancel_job(provider), subjects.acks(provider), subjects.submit_result(provider),
        subjects.heartbeat(provider), subjects.tokens("gw1", provider, job, 1),
        subjects.sealed_chunk(provider, hex32("blob"), 0), subjects.DIRECTORY_REQUEST,
    }  # fmt: skip
    rpc = {example(c) for c in catalogue.CHANNELS if c.reply}
    assert {example(c) for c in catalogue.CHANNELS} - rpc == made - {subjects.DIRECTORY_REQUEST}
    assert subjects.DIRECTORY_REQUEST in rpc
    assert subjects.billing(1, "balance") in rpc
    assert subjects.gateway_keys("list") in rpc
    assert subjects.attestation(provider, "challenge") in rpc


# ---- AsyncAPI and OpenAPI ----


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            yield from refs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from refs(inner)


def resolve(document: dict[str, Any], ref: str) -> Any:
    at: Any = document
    for part in ref.removeprefix("#/").split("/"):
        at = at[part]
    return at


@pytest.mark.parametrize("make", [generate.asyncapi, openapi.openapi])
def test_every_reference_leads_somewhere(make) -> None:  # type: ignore[no-untyped-def]
    document = json.loads(json.dumps(make()))
    found = set(refs(document))
    assert found
    for ref in found:
        assert resolve(document, ref) is not None


def test_the_asyncapi_document_has_every_event_command_end_and_channel() -> None:
    document = generate.asyncapi()
    assert document["asyncapi"] == "3.0.0"
    events = document["channels"]["events"]["messages"]
    assert set(events) == {event.event_type for event in ALL_EVENTS}
    for channel in catalogue.CHANNELS:
        key = channel.name.replace(".", "_")
        assert document["channels"][key]["address"] == channel.address
        for role in channel.publishers:
            operation = document["operations"][f"{role}_sends_{key}"]
            assert operation["action"] == "send"
        for role in channel.hearers:
            assert document["operations"][f"{role}_receives_{key}"]["action"] == "receive"


def test_the_openapi_document_is_valid() -> None:
    OpenAPIV31SpecValidator(openapi.openapi()).validate()


def test_the_openapi_document_has_every_address_of_the_routes() -> None:
    routes = (ROOT / "services/gateway/routes.py").read_text(encoding="utf-8")
    served = {
        path.rstrip("/")
        for path in re.findall(r'path(?: ==| !=|\.startswith\()\s?"([^"]+)"', routes)
    }
    assert served == {
        "/v1/network", "/v1/directory", "/v1/models", "/v1/balance", "/v1/jobs", "/v1/manifests",
    }  # fmt: skip
    described = set(openapi.PATHS) - set(KINDS)  # those are the sidecar's
    assert set(openapi.PATHS) > set(KINDS)
    assert {path.partition("/{")[0] for path in described} == served


def test_every_refusal_is_an_error_of_the_tree() -> None:
    statuses = {
        str(cls.http_status) for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.CocoonError)
    }  # fmt: skip
    for path in openapi.PATHS.values():
        for operation in path.values():
            if isinstance(operation, dict):
                refused = {code for code in operation["responses"] if int(code) >= 400}
                assert refused <= statuses
                assert refused
