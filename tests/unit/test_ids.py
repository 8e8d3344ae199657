"""Ids have one form, and ids that are derived never depend on anything but their parts."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoon.kernel import ids

words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@given(st.binary(min_size=16, max_size=16))
def test_sixteen_bytes_are_a_job_id(raw: bytes) -> None:
    assert ids.is_job_id(ids.job_id(raw))


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_a_job_id_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        ids.job_id(bytes(size))


@pytest.mark.parametrize(
    "text", ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 32 + "\n", " " + "0" * 31]
)
def test_text_of_another_form_is_no_job_id(text: str) -> None:
    assert not ids.is_job_id(text)


def test_a_providers_id_is_its_keys_and_nobody_elses() -> None:
    assert ids.provider_id(bytes(32)) == ids.provider_id(bytes(32))
    assert ids.provider_id(bytes(32)) != ids.provider_id(b"\x01" * 32)
    assert ids.provider_id(bytes(32)).startswith("prov_")
    assert len(ids.provider_id(bytes(32))) == 37


@given(words, st.integers(0, 300), words, st.integers(0, 300))
def test_event_ids_are_equal_only_for_the_same_command_and_place(
    a: str, i: int, b: str, j: int
) -> None:
    assert (ids.event_id(a, i) == ids.event_id(b, j)) == ((a, i) == (b, j))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 300))
def test_event_ids_are_uuids_of_version_5(command: str, index: int) -> None:
    named = f"event\0{command}\0{index}"
    assert ids.event_id(command, index) == str(uuid.uuid5(ids.NAMESPACE, named))


def test_kinds_of_derived_ids_never_meet() -> None:
    made = {
        ids.event_id("a", 0),
        ids.request_command_id(ids.AccountId("a"), "0"),
        ids.named_command_id("a", "0"),
    }
    assert len(made) == 3
    assert all(uuid.UUID(one).version == 5 for one in made)


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
def test_named_commands_with_other_parts_have_other_ids(a: list[str], b: list[str]) -> None:
    assert (ids.named_command_id(*a) == ids.named_command_id(*b)) == (a == b)
