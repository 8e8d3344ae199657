"""What a client asks of its provider is read strictly, and a bad wish is named."""

from __future__ import annotations

import pytest

from cocoon.kernel.errors import BadRequest
from services.gateway.wishes import MAX_PREFERENCES_BYTES, read_affinity, read_preferences


def test_nothing_asked_is_nothing() -> None:
    assert read_preferences({}) is None
    assert read_affinity({}) == ""


def test_wishes_are_read_as_the_client_wrote_them() -> None:
    text = b'{"only":["prov_a"],"sort":"price","max_output_nanoton_per_mtok":"5"}'
    found = read_preferences({b"x-cocoon-preferences": text})
    assert found is not None
    assert (found.only, found.sort, found.max_output_nanoton_per_mtok) == (("prov_a",), "price", 5)
    assert read_affinity({b"x-cocoon-affinity": b"ab" * 16}) == "ab" * 16


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "all of it"),
        (b"[]", "all of it"),
        (b"{", "all of it"),
        (b'{"sort":"fame"}', "sort"),
        (b'{"only":["' + b"x" * 200 + b'"]}', "only.0"),
        (b'{"wish":1}', "wish"),
        (b" " * (MAX_PREFERENCES_BYTES + 1), "8192 bytes"),
        (b'{"only":"\xff"}', "all of it"),
    ],
)
def test_a_wish_that_cannot_be_read_is_refused_by_its_name(text: bytes, named: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_preferences({b"x-cocoon-preferences": text})
    assert refused.value.param == "x-cocoon-preferences"
    assert named in refused.value.message


@pytest.mark.parametrize("text", [b"ab", b"AB" * 16, b"ab" * 17, b"ab" * 16 + b"\n", b"zz" * 16])
def test_an_affinity_key_of_another_form_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        read_affinity({b"x-cocoon-affinity": text})
    assert refused.value.param == "x-cocoon-affinity"
