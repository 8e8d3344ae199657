"""One token from one row of logits: bias, penalties, temperature, nucleus, seed.

Pure but for the generator it draws from; the same seed and logits give the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cocoon.chat import TextRequest
from cocoon.kernel.errors import BadRequest

Logits = NDArray[np.float32]
UNLIKELY: Final = -9999.0  # OpenAI's value for a token without a probability


@dataclass(frozen=True, slots=True)
class Pick:
    """The drawn token, its log probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's sampler. `seed` is used where the request names none."""

    def __init__(
        self, request: TextRequest, *, vocabulary: int, default_temperature: float, seed: int
    ) -> None:
        chosen = request.temperature
        self._temperature = default_temperature if chosen is None else chosen
        self._top_p = 1.0 if request.top_p is None else request.top_p
        self._presence = request.presence_penalty or 0.0
        self._frequency = request.frequency_penalty or 0.0
        self._counts = np.zeros(vocabulary, np.float64)
        self._bias = self._bias_row(request.bias_by_token, vocabulary)
        self._wants_logprobs = request.wants_logprobs
        self._top = request.rivals
        number = seed if request.seed is None else request.seed
        self._random = np.random.Generator(np.random.PCG64(number % 2**64))
        self._plain = (
            self._bias is None
            and not self._presence
            and not self._frequency
            and not self._wants_logprobs
            and self._temperature == 0
        )

    @staticmethod
    def _bias_row(bias: dict[int, float], vocabulary: int) -> NDArray[np.float64] | None:
        if not bias:
            return None
        if max(bias) >= vocabulary:
            raise BadRequest(
                f"Invalid value: 'logit_bias' names a token that is not in the model's "
                f"vocabulary of {vocabulary}.",
                param="logit_bias", code="invalid_value",
            )  # fmt: skip
        row = np.zeros(vocabulary, np.float64)
        for token, value in bias.items():
            row[token] = value
        return row

    def pick(self, logits: Logits) -> Pick:
        """Draw the next token. `logits` is one row over the vocabulary."""
        if self._plain:
            return Pick(int(logits.argmax()))
        scores = logits.astype(np.float64)
        if self._bias is not None:
            scores += self._bias
        if self._presence or self._frequency:
            scores -= self._frequency * self._counts + self._presence * (self._counts > 0)
        token = self._draw(scores)
        self._counts[token] += 1
        return self._with_logprobs(token, scores) if self._wants_logprobs else Pick(token)

    def _draw(self, scores: NDArray[np.float64]) -> int:
        if self._temperature == 0:
            return int(scores.argmax())
        heat = (scores - scores.max()) / self._temperature
        weights = np.exp(heat)
        order = np.argsort(-weights, kind="stable")
        share = np.cumsum(weights[order]) / weights.sum()
        kept = int(np.searchsorted(share, self._top_p, side="left")) + 1
        kept = min(kept, len(order))
        point = self._random.random() * share[kept - 1]
        return int(order[min(int(np.searchsorted(share, point, side="right")), kept - 1)])

    def _with_logprobs(self, token: int, scores: NDArray[np.float64]) -> Pick:
        top_score = scores.max()
        logs = scores - top_score - np.log(np.exp(scores - top_score).sum())
        likeliest = np.argsort(-logs, kind="stable")[: self._top]
        return Pick(
            token,
            max(float(logs[token]), UNLIKELY),
            tuple((int(index), max(float(logs[index]), UNLIKELY)) for index in likeliest),
        )
