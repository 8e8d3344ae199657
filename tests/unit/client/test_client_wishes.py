"""What a caller asks of its provider: split from the body, held by the client, told blindly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cocoon.chat import parse_chat_request
from cocoon.client.wishes import (
    AFFINITY_BYTES,
    DAY_MS,
    Affinity,
    fitting,
    split_wishes,
    with_tier,
)
from cocoon.contracts.matching import Preferences
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import BadRequest
from tests.unit.client.test_client_bounds_and_choice import candidate, draw

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "grüße"}]}


def body(**more: Any) -> bytes:
    return json.dumps({**BODY, **more}).encode()


# ---- the body ----


def test_a_body_without_wishes_stays_byte_for_byte() -> None:
    text = b'{ "model" : "m",  "messages":[] }'
    assert split_wishes(text) == (text, None)
    quoted = body(user='say "provider" twice')
    assert split_wishes(quoted) == (quoted, None)


def test_wishes_are_taken_out_before_anything_is_sealed() -> None:
    content, wishes = split_wishes(body(provider={"ignore": ["prov_a"], "sort": "latency"}))
    assert json.loads(content) == BODY
    assert wishes == Preferences(ignore=("prov_a",), sort="latency")


@pytest.mark.parametrize(
    "text", [b'{"provider"', b'["provider"]', b'"provider"', b'\xff"provider"']
)
def test_what_is_no_object_is_left_to_the_parser_of_requests(text: bytes) -> None:
    assert split_wishes(text) == (text, None)


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"sort": "fame"}, "provider.sort"),
        ({"only": "prov_a"}, "provider.only"),
        ({"favourite": 1}, "provider.favourite"),
        ([], "provider"),
        ({"a" * 500 + "\x07": 1}, "provider." + "a" * 55),
        ({"ignore": ["x" * 128] * 64}, "provider"),
    ],
)
def test_a_wish_that_is_none_is_refused_by_its_name(wishes: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        split_wishes(body(provider=wishes))
    assert (refused.value.param, refused.value.code) == (param, "invalid_value")


def test_null_is_the_same_as_left_out() -> None:
    content, wishes = split_wishes(body(provider=None))
    assert (json.loads(content), wishes) == (BODY, None)


def test_half_a_character_is_left_to_the_parser_of_requests() -> None:
    content, _ = split_wishes(b'{"provider":{},"user":"\\ud83d"}')
    assert content == b'{"user": "\\ud83d"}'


# ---- OpenAI's service_tier ----


@pytest.mark.parametrize(
    ("tier", "wishes", "priority"),
    [
        ("flex", None, "flex"),
        ("priority", Preferences(sort="price"), "priority"),
        ("default", Preferences(), "normal"),
        ("flex", Preferences(priority="flex"), "flex"),
        ("auto", Preferences(priority="flex"), "flex"),
        (None, Preferences(priority="priority"), "priority"),
    ],
)
def test_a_service_tier_is_a_priority(
    tier: str | None, wishes: Preferences | None, priority: str
) -> None:
    asked = with_tier(wishes, tier)
    assert asked is not None
    assert asked.priority == priority
    assert asked.sort == (wishes.sort if wishes else None)


@pytest.mark.parametrize("tier", ["auto", "default", None])
def test_who_asks_for_no_priority_tells_the_network_nothing(tier: str | None) -> None:
    assert with_tier(None, tier) is None


def test_two_different_priorities_are_refused() -> None:
    with pytest.raises(BadRequest) as refused:
        with_tier(Preferences(priority="priority"), "flex")
    assert (refused.value.param, refused.value.code) == ("service_tier", "invalid_value")


# ---- held by the client itself ----

POOL = [
    candidate("a", region="eu"), candidate("b", assurance=Assurance.SIMULATED),
    candidate("c", price=2_000_000, quantisation="int8", region="us"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wishes", "left"),
    [
        ({}, "abc"),
        ({"only": ("a", "c", "z")}, "ac"),
        ({"ignore": ("a",)}, "bc"),
        ({"order": ("c",)}, "abc"),
        ({"order": ("c",), "fallbacks": False}, "c"),
        ({"tiers": ("attested",)}, "ac"),
        ({"quantisations": ("int8", "bf16")}, "c"),
        ({"regions": ("eu", "us")}, "ac"),
        ({"priority": "flex"}, "abc"),
        ({"max_input_nanoton_per_mtok": 1_000_000}, "ab"),
        ({"max_output_nanoton_per_mtok": 1_999_999}, "ab"),
    ],
)
def test_only_who_is_what_the_caller_asks_for_is_left(wishes: dict[str, Any], left: str) -> None:
    assert "".join(c.provider_id for c in fitting(POOL, Preferences(**wishes))) == left


@pytest.mark.parametrize(
    ("wishes", "name"),
    [
        ({"only": ("z",)}, "only"),
        ({"order": ("z",), "fallbacks": False}, "order"),
        ({"ignore": ("a", "b", "c")}, "ignore"),
        ({"tiers": ("facility",)}, "tiers"),
        ({"quantisations": ("bf16",)}, "quantisations"),
        ({"regions": ("asia",)}, "regions"),
        ({"max_input_nanoton_per_mtok": 999_999}, "max_input_nanoton_per_mtok"),
        ({"max_output_nanoton_per_mtok": 0}, "max_output_nanoton_per_mtok"),
    ],
)
def test_a_wish_that_nobody_meets_fails_closed_and_is_named(
    wishes: dict[str, Any], name: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        fitting(POOL, Preferences(**wishes))
    assert (refused.value.param, refused.value.code) == (f"provider.{name}", "no_provider")


def test_the_caller_s_order_is_sealed_to_first() -> None:
    many = [candidate(f"p{index}") for index in range(9)]
    wishes = Preferences(order=("p7", "p2"))
    for seed in range(20):
        assert draw(many, str(seed), wishes=wishes)[:2] == ["p7", "p2"]


def test_a_name_that_is_given_twice_is_sealed_to_once() -> None:
    assert draw([candidate("a"), candidate("b")], wishes=Preferences(order=("a", "a"))) == [
        "a",
        "b",
    ]


def test_who_asks_far_more_than_the_middle_is_sealed_to_by_name_only() -> None:
    many = [candidate(f"p{index}") for index in range(9)]
    robber = candidate("robber", price=4_000_001)
    for seed in range(100):
        assert "robber" not in draw([*many, robber], str(seed), affinity=f"{seed:032x}")
    assert draw([*many, robber], wishes=Preferences(order=("robber",)))[0] == "robber"
    assert draw([robber]) == ["robber"]


def test_who_sorts_by_price_seals_to_the_cheapest() -> None:
    many = [candidate(f"p{index}", price=1_000_000 + index) for index in range(9)]
    assert draw(many, wishes=Preferences(sort="price")) == ["p0", "p1", "p2"]


# ---- the warm set ----


def test_a_conversation_is_sealed_to_its_two_warm_providers_and_one_drawn() -> None:
    many = [candidate(f"p{index}") for index in range(12)]
    drawn = [draw(many, str(seed), affinity="ab" * 16) for seed in range(60)]
    assert len({tuple(three[:2]) for three in drawn}) == 1
    assert len({three[2] for three in drawn}) > 5
    assert tuple(draw(many, affinity="cd" * 16)[:2]) != tuple(drawn[0][:2])


def test_a_full_warm_provider_is_not_waited_for() -> None:
    many = [candidate(f"p{index}") for index in range(12)]
    warm = draw(many, affinity="ab" * 16)[:2]
    full = [candidate(c.provider_id, running=4 * (c.provider_id in warm)) for c in many]
    assert not set(draw(full, affinity="ab" * 16)[:2]) & set(warm)


def of(
    *messages: tuple[str, str], key: str = "ck", day: int = 0, model: str = "m", **more: str
) -> str:
    told = [{"role": role, "content": content} for role, content in messages]
    request = parse_chat_request({"model": model, "messages": told, **more})
    return Affinity(b"secret").of(request, key, day * DAY_MS)


def test_an_affinity_key_stays_as_a_conversation_grows() -> None:
    first = of(("system", "be brief"), ("user", "hello"))
    assert len(bytes.fromhex(first)) == 16
    grown = of(("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "more"))
    assert grown == first


def test_another_beginning_tenant_model_day_or_client_has_another_key() -> None:
    long = "x" * AFFINITY_BYTES
    keys = [
        of(("user", "hello")), of(("user", "hello!")), of(("system", "hello")),
        of(("system", "hel"), ("user", "lo")), of(("user", "hello"), key="ck2"),
        of(("user", "hello"), user="alice"), of(("user", "hello"), model="n"),
        of(("user", "hello"), day=1), of(("user", long)),
        Affinity(b"other").of(
            parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "hello"}]}),
            "ck", 0,
        ),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert of(("user", long + "tail")) == of(("user", long))
