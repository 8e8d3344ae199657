"""Token bounds and the choice of providers: pure arithmetic and a fair draw."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.chat import parse_chat_request, parse_completion_request, parse_embedding_request
from cocoon.client.bounds import DEFAULT_OUTPUT_TOKENS, TokenBounds, token_bounds
from cocoon.client.choice import Candidate, choose, one_model, with_assurance
from cocoon.client.repeats import Asked
from cocoon.contracts.events import Quote
from cocoon.evidence.verdict import Assurance
from cocoon.kernel.errors import BadRequest, EvidenceRejected
from cocoon.sealing import KeyBundle
from tests.support.sealing_world import Counted


def request(text: str = "hi", **more: Any) -> Any:
    return parse_chat_request(
        {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    )


@given(
    st.text(max_size=2000),
    st.integers(min_value=16, max_value=200_000),
    st.none() | st.integers(min_value=1, max_value=10_000),
)
@settings(max_examples=100)
def test_bounds_fit_the_context_and_cover_bytes(text: str, context: int, asked: int | None) -> None:
    if asked is not None and asked >= context:
        with pytest.raises(BadRequest, match="context"):
            token_bounds(request(text, max_tokens=asked), context)
        return
    bounds = token_bounds(request(text, max_tokens=asked), context)
    assert bounds.max_input_tokens >= 1
    assert bounds.max_output_tokens >= 1
    assert bounds.max_input_tokens + bounds.max_output_tokens <= context
    assert asked is None or bounds.max_output_tokens == asked
    fits = len(text.encode()) + bounds.max_output_tokens <= context
    assert bounds.max_input_tokens >= (len(text.encode()) if fits else 1)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_bound_over_the_context_is_named_as_it_was_sent(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        token_bounds(request(**{name: 100_000}), 640)
    assert caught.value.param == name
    assert caught.value.code == "context_length_exceeded"


def test_an_unbounded_answer_gets_what_the_context_leaves_up_to_the_default() -> None:
    assert token_bounds(request(), 100_000).max_output_tokens == DEFAULT_OUTPUT_TOKENS
    assert token_bounds(request("x" * 300), 640).max_output_tokens == 640 - 300 - 8 - 64
    assert token_bounds(request("x" * 630), 640).max_output_tokens == 80


@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=20))
def test_embeddings_are_bounded_by_their_bytes_in_steps_and_write_nothing(
    texts: list[str],
) -> None:
    asked = parse_embedding_request({"model": "m", "input": texts})
    bounds = token_bounds(asked, 65_536)
    needed = sum(len(text.encode()) + 2 for text in texts)
    assert needed <= bounds.max_input_tokens < needed + 64
    assert bounds.max_input_tokens % 64 == 0
    assert bounds.max_output_tokens == 0
    assert token_bounds(asked, 3) == TokenBounds(3, 0)


@given(st.text(min_size=1, max_size=300), st.none() | st.integers(1, 100))
def test_a_completion_is_bounded_by_its_bytes_in_steps(text: str, asked: int | None) -> None:
    request = parse_completion_request({"model": "m", "prompt": text, "max_tokens": asked})
    bounds = token_bounds(request, 4096)
    assert bounds.max_output_tokens == (16 if asked is None else asked)
    assert bounds.max_input_tokens >= len(text.encode())
    assert bounds.max_input_tokens % 64 == 0


def test_a_completions_bound_over_the_context_is_named() -> None:
    request = parse_completion_request({"model": "m", "prompt": "x", "max_tokens": 700})
    with pytest.raises(BadRequest) as caught:
        token_bounds(request, 640)
    assert caught.value.param == "max_tokens"


def test_the_same_bytes_for_another_endpoint_are_another_request() -> None:
    asked = [
        Asked(b"{}", "caller", None, 1, endpoint=endpoint).fingerprint
        for endpoint in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
    ]
    assert len(set(asked)) == 3


def candidate(name: str, **more: Any) -> Candidate:
    price = more.pop("price", 1_000_000)
    fields: dict[str, Any] = {
        "provider_id": name,
        "signing_key": bytes(32),
        "assurance": Assurance.ATTESTED,
        "bundle": KeyBundle(bytes(32), 1, 0, 1, bytes(32)),
        "quote": Quote(
            model_id=more.pop("model_id", "ab" * 32), input_nanoton_per_mtok=price,
            cached_input_nanoton_per_mtok=price, output_nanoton_per_mtok=price, fee_bps=0,
        ),
        "context_tokens": 4096,
        "running": 0,
        "concurrency": 4,
        "valid_until_ms": 2**62,
    }  # fmt: skip
    return Candidate(**{**fields, **more})


def draw(candidates: list[Candidate], seed: str = "s", **more: Any) -> list[str]:
    asked: dict[str, Any] = {
        "max_input_tokens": 100, "max_output_tokens": 100, "max_price_nanoton": None,
        "randomness": Counted(seed),
    }  # fmt: skip
    return [item.provider_id for item in choose(candidates, **{**asked, **more})]


def test_three_are_drawn_without_repetition() -> None:
    many = [candidate(f"p{index}") for index in range(10)]
    drawn = draw(many)
    assert len(drawn) == len(set(drawn)) == 3
    assert sorted(draw(many[:2])) == ["p0", "p1"]


def test_equal_providers_are_spread_evenly() -> None:
    many = [candidate(f"p{index}") for index in range(6)]
    counts = Counter(name for seed in range(600) for name in draw(many, str(seed)))
    assert all(220 < counts[f"p{index}"] < 380 for index in range(6))


def test_cheap_and_idle_providers_are_drawn_first_and_not_always() -> None:
    many = [candidate("cheap"), candidate("dear", price=3_000_000), candidate("full", running=4)]
    first = Counter(draw(many, str(seed))[0] for seed in range(400))
    assert first["cheap"] > 1.3 * first["dear"]
    assert first["dear"] > 0
    assert first["full"] > 0


def test_a_context_or_price_that_nobody_meets_is_refused_by_its_name() -> None:
    with pytest.raises(BadRequest) as caught:
        draw([candidate("p", context_tokens=150)])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(BadRequest) as caught:
        draw([candidate("p")], max_price_nanoton=199)
    assert caught.value.code == "price_limit"
    assert draw([candidate("p"), candidate("q", price=2_000_000)], max_price_nanoton=200) == ["p"]


def test_only_accepted_tiers_are_left() -> None:
    simulated = candidate("s", assurance=Assurance.SIMULATED)
    assert with_assurance([simulated, candidate("a")], {Assurance.ATTESTED}) == [candidate("a")]
    with pytest.raises(EvidenceRejected, match="simulated"):
        with_assurance([simulated], {Assurance.ATTESTED})


def test_one_name_means_the_model_that_most_providers_serve() -> None:
    rogue = candidate("r", model_id="ff" * 32)
    assert one_model([rogue, candidate("a"), candidate("b")]) == [candidate("a"), candidate("b")]
    assert one_model([]) == []
