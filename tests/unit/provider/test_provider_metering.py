"""No count that an honest agent signs is beyond what its ciphertext can carry, in any profile."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.chat import Answer, TokenUsage, parse_chat_request, to_json
from cocoon.contracts.events import Quote
from cocoon.domain import metering
from cocoon.sealing import Profile, Receipt, ResponseSealer, Status
from services.provider.answering import Telling, bill
from services.provider.backends.base import Ended, Piece
from tests.support import sealing_world

WAYS = [
    (Profile.P0, False), (Profile.P3, False),
    (Profile.P1, True), (Profile.P2, True), (Profile.P3, True),
]  # fmt: skip
QUOTE = Quote(
    model_id="11" * 32, input_nanoton_per_mtok=1, cached_input_nanoton_per_mtok=1,
    output_nanoton_per_mtok=1, fee_bps=0,
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
pieces = st.lists(st.tuples(texts, st.integers(1, 30), st.booleans()), max_size=12)
ends = st.sampled_from(["stop", "length", "cancel"])


def answered(
    way: tuple[Profile, bool], said: list[tuple[str, int, bool]], more: int, reasoning: int,
    end: str,
) -> tuple[Receipt, int, int]:  # fmt: skip
    """The receipt of one answer, and the bytes of its response and its request."""
    profile, stream = way
    body: dict[str, Any] = {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream,
    }  # fmt: skip
    envelope = sealing_world.sealed(profile=profile, stream=stream).envelope
    opened = sealing_world.opened(envelope)
    sealer = ResponseSealer(opened)
    answer = Answer("ab" * 16, 1_790_000_000, "fp", parse_chat_request(to_json(body)))
    telling = Telling(sealer, answer, profile=profile, stream=stream)
    telling.prompt_tokens = 5
    size, tokens = len(sealer.prefix()), more
    for text, count, seal in said:
        telling.add(Piece(text, count), 2**24)
        tokens += count
        if seal:
            size += len(telling.seal_waiting())
    if end == "cancel":
        telling.cancel()
    else:
        tokens = min(tokens, 1024)  # as the header bounds it
        telling.end(Ended(end, TokenUsage(5, tokens, reasoning=min(reasoning, tokens))))  # type: ignore[arg-type]
    size += len(telling.seal_waiting())
    assert telling.status is not None
    found = bill(telling.status, telling.usage, opened.header, QUOTE)
    counts = dict(
        zip(
            ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"),
            found.counts, strict=True,
        )
    )  # fmt: skip
    raw = sealing_world.signed_receipt(sealer, status=telling.status, **counts)
    return Receipt.decode(raw), size + len(sealer.finish(raw)), len(envelope)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WAYS), pieces, st.integers(0, 900), st.integers(0, 900), ends)
def test_an_honest_answer_is_never_impossible(
    way: tuple[Profile, bool], said: list[tuple[str, int, bool]], more: int, reasoning: int,
    end: str,
) -> None:  # fmt: skip
    receipt, response_bytes, envelope_bytes = answered(way, said, more, reasoning, end)
    assert receipt.reasoning_tokens <= receipt.output_tokens
    assert not metering.impossible_counts(
        receipt, envelope_bytes=envelope_bytes, response_bytes=response_bytes
    )


def test_tokens_that_no_text_shows_are_declared() -> None:
    receipt, _, _ = answered((Profile.P2, True), [("four", 4, True)], 500, 0, "stop")
    assert receipt.status is Status.COMPLETE
    assert receipt.output_tokens == 504
    assert receipt.reasoning_tokens == 504 - len("four") - metering.UNSHOWN_TOKENS


def test_what_an_engine_declares_itself_stays() -> None:
    receipt, _, _ = answered((Profile.P2, True), [("four", 4, True)], 500, 490, "stop")
    assert (receipt.output_tokens, receipt.reasoning_tokens) == (504, 490)


def test_an_unpadded_answer_s_own_size_is_close_to_its_bound() -> None:
    """P3 loses nothing to padding: what is not text are JSON's own bytes, some 700 of them."""
    _, response_bytes, _ = answered((Profile.P3, False), [("x" * 4000, 1, True)], 0, 0, "stop")
    assert 4000 <= metering.most_shown_tokens(response_bytes) <= 4800
