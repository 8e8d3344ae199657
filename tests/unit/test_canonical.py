"""One value has one canonical form, and nothing else is read as it."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.contracts.base import Contract
from cocoon.contracts.commands import ALL_COMMANDS, SettleResult
from cocoon.contracts.events import EventData
from cocoon.contracts.messages import ErrorBody
from cocoon.kernel import canonical
from cocoon.models.manifest import describe_server
from tests.support.event_examples import EXAMPLES

keys = st.text(st.characters(max_codepoint=127), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_every_value_survives_the_round_trip(value: object) -> None:
    data = canonical.dumps(value)
    assert canonical.loads(data) == value
    assert canonical.dumps(canonical.loads(data)) == data


@given(st.dictionaries(keys, scalars, min_size=2, max_size=6))
def test_the_order_of_keys_does_not_change_the_bytes(value: dict[str, object]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert canonical.dumps(backwards) == canonical.dumps(value)
    assert canonical.digest(backwards) == canonical.digest(value)


def test_the_form_is_sorted_without_spaces_and_in_utf8() -> None:
    assert (
        canonical.dumps({"b": [1, "é", None], "a": True}) == '{"a":true,"b":[1,"é",null]}'.encode()
    )


@pytest.mark.parametrize(
    "value",
    [1.0, float("nan"), {"a": 0.5}, 2**53 + 1, -(2**53) - 1, {1: 2}, {"é": 1}, b"bytes", {1, 2},
     "\ud800", {"a": "\udfff"}, object()],
)  # fmt: skip
def test_what_json_readers_disagree_about_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical.dumps(value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1}',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":1.0}',
        b'{"a":1e2}',
        b'{"a":-0}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":"\\u0061"}',
        b'{"a":"\\/"}',
        b'"\\ud800"',
        b' {"a":1}',
        b'{"a":1}\n',
        b"\xef\xbb\xbf{}",
        b"\xff",
        b"",
        b"{",
        b"9007199254740993",
        b"1" * 5000,
        b"[" * 100_000,
    ],
)
def test_bytes_that_are_not_the_canonical_form_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical.loads(data)


@pytest.mark.parametrize("depth", [900, 940, 960, 980, 990, 1000, 2000])
def test_deep_nesting_is_an_error_of_the_input_and_never_of_the_process(depth: int) -> None:
    data = b"[" * depth + b"]" * depth
    with contextlib.suppress(ValueError):
        canonical.loads(data)


def test_a_value_nested_too_deeply_has_no_canonical_form() -> None:
    value: object = 0
    for _ in range(2000):
        value = [value]
    with pytest.raises(ValueError, match="deeply"):
        canonical.dumps(value)


def test_loose_reading_takes_other_spellings_but_no_duplicate_keys() -> None:
    assert canonical.loads(b'{"b": 1, "a": 2}', strict=False) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="duplicate"):
        canonical.loads(b'{"a":1,"a":2}', strict=False)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b'"a"'])
def test_where_an_object_is_expected_nothing_else_is_taken(data: bytes) -> None:
    with pytest.raises(ValueError, match="object"):
        canonical.loads_object(data)


@given(values)
def test_the_bytes_are_those_of_the_standard_librarys_writer(value: object) -> None:
    theirs = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    assert canonical.dumps(value) == theirs.encode()


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.event_type)
def test_a_contract_writes_the_canonical_form_of_its_fields(event: EventData) -> None:
    assert event.to_canonical() == canonical.dumps(event.model_dump(mode="json"))


@pytest.mark.parametrize("kind", [*ALL_COMMANDS, *{type(event) for event in EXAMPLES}])
def test_every_contracts_fields_are_in_the_order_of_their_bytes(kind: type[Contract]) -> None:
    assert list(kind.model_fields) == sorted(kind.model_fields)


def test_a_field_that_pydantic_would_not_write_canonically_is_refused() -> None:
    for kind in (dict[str, str], float, tuple[dict[str, int], ...], list[float] | None):
        with pytest.raises(TypeError, match="no canonical form"):
            type("Loose", (Contract,), {"__annotations__": {"field": kind}})


def test_a_models_id_does_not_depend_on_the_order_of_its_arguments() -> None:
    arguments = {"model": "m", "quantisation": "q8", "context_tokens": "4096"}
    there = describe_server("llama", arguments)
    back = describe_server("llama", dict(reversed(arguments.items())))
    known = "ce2ca13358b9d8ed0bea2b06a008cd6eff0c4f1d71028e559d6ba6f4f0f2644a"  # pragma: allowlist secret  # noqa: E501
    assert there.model_id == back.model_id == known


def test_a_stored_command_is_canonical() -> None:
    command = SettleResult(
        job_id="0f" * 16, provider_id="p", epoch=1, receipt="cd" * 420, blob_hash="ab" * 32,
        response_bytes=7,
    )  # fmt: skip
    value = {"type": "SettleResult", "command": command.model_dump(mode="json")}
    assert command.to_stored() == canonical.dumps(value)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_a_contract_writes_any_text_as_the_canonical_form_does(text: str) -> None:
    body = ErrorBody(status=400, code="x", message=text)
    assert body.to_canonical() == canonical.dumps(body.model_dump(mode="json"))
