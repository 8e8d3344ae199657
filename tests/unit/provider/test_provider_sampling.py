"""Sampling: greedy, seeded, biased, penalised, cut to the nucleus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cocoon.chat import ChatRequest, parse_chat_request
from cocoon.kernel.errors import BadRequest
from services.provider.backends.sampling import Sampler

LOGITS = np.array([1.0, 3.0, 2.0, -1.0], np.float32)


def request(**parameters: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **parameters}
    return parse_chat_request(body)


def sampler(seed: int = 1, default: float = 0.0, **parameters: Any) -> Sampler:
    return Sampler(request(**parameters), vocabulary=4, default_temperature=default, seed=seed)


def draws(count: int = 400, **parameters: Any) -> list[int]:
    one = sampler(**parameters)
    return [one.pick(LOGITS).token for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(temperature=0)) == {1}
    assert set(draws()) == {1}  # the model's own default


def test_the_same_seed_repeats_and_another_differs() -> None:
    assert draws(temperature=1, seed=5) == draws(temperature=1, seed=5)
    assert draws(temperature=1, seed=5) != draws(temperature=1, seed=6)
    assert draws(temperature=1, seed=-3) == draws(temperature=1, seed=-3)


def test_draws_follow_the_distribution() -> None:
    drawn = draws(4000, temperature=1, seed=7)
    weights = np.exp(LOGITS.astype(float))
    for token, weight in enumerate(weights / weights.sum()):
        assert abs(drawn.count(token) / 4000 - weight) < 0.03


def test_the_nucleus_keeps_the_likeliest_that_make_up_top_p() -> None:
    assert set(draws(temperature=1, seed=3, top_p=0.5)) == {1}
    assert set(draws(temperature=1, seed=3, top_p=0)) == {1}
    assert set(draws(temperature=1, seed=3, top_p=0.85)) == {1, 2}
    assert set(draws(2000, temperature=2, seed=3, top_p=1)) == {0, 1, 2, 3}


def test_bias_bans_and_forces() -> None:
    assert set(draws(logit_bias={"1": -100})) == {2}
    assert set(draws(temperature=1, seed=1, logit_bias={"3": 100})) == {3}
    with pytest.raises(BadRequest) as caught:
        sampler(logit_bias={"4": 1})
    assert caught.value.param == "logit_bias"


def test_penalties_push_towards_new_tokens() -> None:
    assert draws(3, presence_penalty=1.5) == [1, 2, 1]
    assert draws(4, frequency_penalty=0.8) == [1, 1, 2, 1]


def test_logprobs_are_those_of_the_distribution_and_in_order() -> None:
    pick = sampler(logprobs=True, top_logprobs=3).pick(LOGITS)
    weights = np.exp(LOGITS.astype(float))
    assert pick.logprob == pytest.approx(math.log(weights[1] / weights.sum()))
    assert [token for token, _ in pick.top] == [1, 2, 0]
    assert sampler(logprobs=True).pick(LOGITS).top == ()
    banned = sampler(logprobs=True, top_logprobs=4, logit_bias={"0": -100}).pick(LOGITS)
    assert banned.top[-1][1] < -90
