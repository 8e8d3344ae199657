"""An answer's size is known before it is sealed, and never too small: it fits, or is cut to fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.chat import Answer, TokenLogprob, TokenUsage, parse_chat_request, to_json
from cocoon.sealing import Profile, ResponseSealer, Status
from services.provider.answering import Telling
from services.provider.backends.base import Ended, Piece
from tests.support import sealing_world

PLAIN: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WAYS = [
    (Profile.P0, False), (Profile.P3, False),
    (Profile.P1, True), (Profile.P2, True), (Profile.P3, True),
]  # fmt: skip
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)


class Sealed:
    """One answer on its way, and the bytes of it that were sealed."""

    def __init__(self, profile: Profile, *, stream: bool, logprobs: bool = False) -> None:
        body = {**PLAIN, "stream": stream, "logprobs": logprobs}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = Answer("ab" * 16, 1_790_000_000, "fp", parse_chat_request(to_json(body)))
        envelope = sealing_world.sealed(profile=profile, stream=stream).envelope
        self.sealer = ResponseSealer(sealing_world.opened(envelope))
        self.telling = Telling(self.sealer, answer, profile=profile, stream=stream)
        self.telling.prompt_tokens = 5
        self.size = len(self.sealer.prefix())

    def seal(self) -> None:
        self.size += len(self.telling.seal_waiting())

    def finish(self) -> int:
        self.seal()
        self.size += len(self.sealer.finish(sealing_world.signed_receipt(self.sealer)))
        return self.size


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(WAYS),
    st.booleans(),
    st.integers(40_000, 120_000),
    st.lists(st.tuples(texts, st.integers(1, 9), st.booleans()), max_size=60),
    st.integers(1, 40),
)
def test_whatever_is_taken_ends_within_its_room(
    way: tuple[Profile, bool], logprobs: bool, room_bytes: int,
    pieces: list[tuple[str, int, bool]], longer: int,
) -> None:  # fmt: skip
    profile, stream = way
    made = Sealed(profile, stream=stream, logprobs=logprobs)
    taken = 0
    for text, tokens, seal in pieces:
        entries = (TokenLogprob(text[:3], text[:3].encode(), -1.5),) * tokens
        piece = Piece(text * longer, tokens, entries if logprobs else ())
        # what `prefix` brings is in the room that an answer needs to its end
        left_bytes = room_bytes - made.size + len(made.sealer.prefix())
        if not made.telling.add(piece, left_bytes):
            break
        taken += tokens
        if seal:
            made.seal()
    else:
        made.telling.end(Ended("stop", TokenUsage(5, taken)))
    assert made.finish() <= room_bytes
    owed = made.telling.usage
    if made.telling.status is Status.LENGTH:
        assert taken <= owed.completion <= taken + tokens
    else:
        assert (owed.prompt, owed.completion) == (5, taken)


@pytest.mark.parametrize("stream", [True, False])
def test_one_piece_that_is_too_long_is_cut_and_its_share_is_owed(stream: bool) -> None:
    made = Sealed(Profile.P3, stream=stream)
    piece = Piece("word " * 10_000, 10_000)
    assert not made.telling.add(piece, 20_000)
    assert (made.telling.status, made.telling.ended) == (Status.LENGTH, True)
    assert 17_000 < made.finish() <= 20_000
    tokens = made.telling.usage.completion
    assert made.telling.usage == TokenUsage(5, tokens)
    assert 17_000 < 5 * tokens < 20_000


def test_where_not_one_token_fits_nothing_is_owed() -> None:
    made = Sealed(Profile.P3, stream=True)
    assert not made.telling.add(Piece("x" * 50_000, 1), 20_000)
    assert (made.telling.status, made.telling.usage) == (Status.LENGTH, TokenUsage(0, 0))
