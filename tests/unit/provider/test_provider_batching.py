"""Continuous batching gives every sequence what it would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoon.chat import parse_chat_request
from services.provider.backends.batching import MAX_BATCH, Batcher, Generation
from services.provider.backends.sampling import Pick, Sampler

VOCABULARY = 16
REQUEST = parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "x"}]})


class Ends:
    def __init__(self, limit: int) -> None:
        self.tokens: list[int] = []
        self.gone = False
        self._limit = limit

    def take(self, pick: Pick) -> bool:
        self.tokens.append(pick.token)
        return len(self.tokens) < self._limit


def run_graph(ids: Any, keys: Any, values: Any) -> tuple[Any, Any, Any]:
    """A graph of the engine's shapes: the next token is a hash of all tokens so far."""
    assert 1 <= ids.shape[0] <= MAX_BATCH
    fresh = np.repeat(ids[None, :, None, :, None], 1, axis=0).astype(np.float32)
    keys = np.concatenate((keys, fresh), axis=3)
    values = np.concatenate((values, fresh), axis=3)
    history = keys[0, :, 0, :, 0].astype(np.int64)
    marks = (history * np.arange(1, history.shape[1] + 1) ** 2).sum(axis=1) % VOCABULARY
    return np.eye(VOCABULARY, dtype=np.float32)[marks], keys, values


def empty(batch: int) -> Any:
    return np.zeros((1, batch, 1, 0, 1), np.float32)


def generation(prompt: list[int], limit: int) -> tuple[Generation, Ends]:
    sink = Ends(limit)
    sampler = Sampler(REQUEST, vocabulary=VOCABULARY, default_temperature=0, seed=1)
    return Generation(prompt, sampler, sink), sink


def alone(prompt: list[int], limit: int) -> list[int]:
    batcher = Batcher(run_graph, empty)
    one, sink = generation(prompt, limit)
    batcher.add([one])
    while len(batcher):
        batcher.step()
    return sink.tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 15), min_size=1, max_size=4),
            st.integers(1, 8),
            st.integers(0, 5),
            st.booleans(),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_sequence_gets_the_same_tokens_in_any_company(
    asked: list[tuple[list[int], int, int, bool]],
) -> None:
    batcher = Batcher(run_graph, empty)
    waiting = [(at, *generation(prompt, limit)) for prompt, limit, at, _ in asked]
    for moment in range(16):
        batcher.step()
        batcher.add([one for at, one, _ in waiting if at == moment])
        for (_, _, leaves_at, leaves), (_, _, sink) in zip(asked, waiting, strict=True):
            if leaves and moment == leaves_at + 1:
                sink.gone = True
    assert len(batcher) == 0
    for (prompt, limit, _, leaves), (_, _, sink) in zip(asked, waiting, strict=True):
        whole = alone(prompt, limit)
        assert sink.tokens == whole[: len(sink.tokens)]
        assert leaves or sink.tokens == whole
